from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_openrlhf.divergences import correction_weight, kl_estimate
from dcpo_openrlhf.methods import (
    METHODS,
    Constants,
    Method,
    aepo_rows,
    expected_weight,
    method_advantage,
    penalty_weight,
    rewards_solved_groups,
)
from dcpo_openrlhf.objectives import (
    clipped_surrogate,
    group_advantage,
    loss_denominator,
    mixed_advantage,
    mixing_weights,
    objective_terms,
    population_scale,
    surrogate_terms,
    target_ratio,
    token_covariance,
    token_weight,
)
from dcpo_openrlhf.recipe.method import Method as RecipeMethod
from tests import reference

GROUP, TIME, VOCABULARY = 4, 5, 7
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
LOTS = 11
"""Seed of what clip_cov draws."""
LENGTHS = (5, 3, 1, 4, 2, 0, 5, 4, 3, 3, 5, 2, 1, 4, 5, 2)  # a row without tokens is among them
SUCCESS = (1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0)  # mixed, all-correct, all-wrong, mixed


def make_batch(seed: int = 0, temperature: float = 1.2, tempered: bool = False) -> reference.Batch:
    """Four groups of four; with `tempered`, the last two groups come from pi_old^T."""
    g = torch.Generator().manual_seed(seed)
    rows = len(LENGTHS)
    old = 1.5 * torch.randn(rows, TIME, VOCABULARY, generator=g, dtype=torch.float64)
    new = old + 0.3 * torch.randn(old.shape, generator=g, dtype=torch.float64)
    return reference.Batch(
        logits=new.tolist(),
        old_logits=old.tolist(),
        tokens=torch.randint(VOCABULARY, (rows, TIME), generator=g).tolist(),
        mask=[[float(t < n) for t in range(TIME)] for n in LENGTHS],
        reward=[float(r) for r in SUCCESS],
        tempered=[tempered and i >= rows // 2 for i in range(rows)],
        group_size=GROUP,
        temperature=temperature,
        lots=torch.rand(rows, TIME, generator=torch.Generator().manual_seed(LOTS)).tolist(),
    )


@dataclasses.dataclass
class Tensors:
    """What the trainer has of a batch, [batch, time] unless said otherwise."""

    logits: torch.Tensor
    logp: torch.Tensor
    old_logp: torch.Tensor
    rho: torch.Tensor
    entropy: torch.Tensor
    old_entropy: torch.Tensor
    expected_logp: torch.Tensor
    mask: torch.Tensor
    reward: torch.Tensor
    tempered_rows: torch.Tensor


def tensors_of(batch: reference.Batch) -> Tensors:
    logits = torch.tensor(batch.logits, dtype=torch.float64, requires_grad=True)
    old = torch.tensor(batch.old_logits, dtype=torch.float64)
    tokens = torch.tensor(batch.tokens)[..., None]
    mask = torch.tensor(batch.mask, dtype=torch.float64)
    log_pi, log_old, log_target = logits.log_softmax(-1), old.log_softmax(-1), (old / batch.temperature).log_softmax(-1)
    old_logp = log_old.gather(-1, tokens)[..., 0]
    return Tensors(
        logits=logits,
        logp=log_pi.gather(-1, tokens)[..., 0],
        old_logp=old_logp,
        rho=target_ratio(old_logp=old_logp, tempered_logp=log_target.gather(-1, tokens)[..., 0], mask=mask),
        entropy=-(log_pi.exp() * log_pi).sum(-1),
        old_entropy=-(log_old.exp() * log_old).sum(-1),
        expected_logp=(log_target.exp() * log_pi).sum(-1),
        mask=mask,
        reward=torch.tensor(batch.reward, dtype=torch.float64),
        tempered_rows=torch.tensor(batch.tempered),
    )


def constants_of(s: reference.Settings) -> Constants:
    return Constants(
        entropy_adv_beta=s.beta,
        entropy_adv_kappa=s.kappa,
        scope_weight=s.scope_weight,
        clip_cov_share=s.clip_cov[0],
        clip_cov_low=s.clip_cov[1],
        clip_cov_high=s.clip_cov[2],
        kl_cov_share=s.kl_cov[0],
        kl_cov_coefficient=s.kl_cov[1],
        entropic_threshold=s.threshold,
    )


def loss_of(method: Method, x: Tensors, s: reference.Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradient with respect to the logits) the way a trainer would compute them."""
    a = group_advantage(reward=x.reward, group_size=GROUP)
    tokens = {"old_logp": x.old_logp.detach(), "mask": x.mask, "constants": constants_of(s)}
    advantages = method_advantage(
        method,
        group_advantage=a,
        success=x.reward,
        target_ratio=x.rho,
        entropy=x.old_entropy,
        alpha=s.alpha,
        mixing=s.mixing,
        tempered_rows=x.tempered_rows,
        sample_weight=s.sample_weight,
        seed=LOTS,
        **tokens,
    )
    weight = token_weight(mask=x.mask, aggregation=s.aggregation)
    if method.separate_averages:
        scale = population_scale(mask=x.mask, tempered_rows=x.tempered_rows, aggregation=s.aggregation)
        weight = weight * scale[:, None]
    row_weight = expected_weight(method, success=x.reward, alpha=s.alpha, mixing=s.mixing)
    terms = objective_terms(
        logp=x.logp,
        old_logp=x.old_logp,
        advantages=advantages,
        weight=weight,
        mask=x.mask,
        clip_low=s.clip_low,
        clip_high=s.clip_high,
        dual_clip=s.dual_clip,
        entropy=x.entropy if method.entropy_gradient else None,
        entropy_coefficient=s.entropy_coefficient,
        expected_logp=None if row_weight is None else x.expected_logp,
        expected_weight=None if row_weight is None else row_weight[:, None].expand_as(x.mask),
        penalty_weight=penalty_weight(method, group_advantage=a, **tokens),
    )
    loss = terms.loss_sum / loss_denominator(mask=x.mask, aggregation=s.aggregation)
    (gradient,) = torch.autograd.grad(loss, x.logits)
    return loss.detach(), gradient


# ---- against the slow twin ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", ["convex", "additive"])
@pytest.mark.parametrize(
    ("aggregation", "dual_clip"), [("sequence_mean", None), ("token_mean", None), ("sequence_mean", 1.3)]
)
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_equal_the_twin(name, aggregation, dual_clip, mixing):
    batch = make_batch(tempered=METHODS[name].samples == "policy+tempered")
    s = reference.Settings(mixing=mixing, aggregation=aggregation, dual_clip=dual_clip)
    loss, gradient = loss_of(METHODS[name], tensors_of(batch), s)
    twin_loss, twin_gradient = reference.loss_and_gradient(name, batch, s)
    torch.testing.assert_close(loss, torch.tensor(twin_loss, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient, torch.tensor(twin_gradient, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_kl_to_the_starting_model_and_its_gradient_equal_the_twin(aggregation, estimator, unbiased):
    batch = make_batch()
    x, s = tensors_of(batch), reference.Settings(aggregation=aggregation)
    start = x.old_logp + 0.5 * torch.randn(x.mask.shape, generator=torch.Generator().manual_seed(5), dtype=x.mask.dtype)
    estimate = kl_estimate(
        logp=x.logp,
        reference_logp=start.masked_fill(x.mask == 0, float("nan")),
        old_logp=x.old_logp,
        mask=x.mask,
        estimator=estimator,
        unbiased_gradient=unbiased,
    )
    weight = token_weight(mask=x.mask, aggregation=aggregation)
    common = {"logp": x.logp, "old_logp": x.old_logp, "weight": weight, "mask": x.mask, **CLIP}
    terms = objective_terms(advantages=[torch.zeros_like(x.mask)], kl=estimate, kl_coefficient=0.3, **common)
    (gradient,) = torch.autograd.grad(terms.loss_sum, x.logits)
    weights = reference.averaging_weights("grpo", batch, s)
    count = float(loss_denominator(mask=x.mask, aggregation=aggregation))
    loss, expected = 0.0, torch.zeros_like(gradient)
    for i, row in enumerate(batch.logits):
        for t, z in enumerate(row):
            if batch.mask[i][t]:
                a, p = batch.tokens[i][t], reference.softmax(z)
                value, slope = reference.kl_to_reference(
                    math.log(p[a]), float(start[i, t]), float(x.old_logp[i, t]), estimator, unbiased
                )
                loss += 0.3 * weights[i][t] * value * count
                onehot = torch.nn.functional.one_hot(torch.tensor(a), VOCABULARY)
                expected[i, t] = 0.3 * weights[i][t] * count * slope * (onehot - torch.tensor(p, dtype=torch.float64))
    assert float(terms.loss_sum.detach()) == pytest.approx(loss, abs=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_unbiased_gradient_is_that_of_the_divergence(estimator):
    """By enumeration of the tokens: E_{a ~ pi_old}[gradient] = grad KL(pi_theta || pi_ref)."""
    g = torch.Generator().manual_seed(1)
    z, old, start = (torch.randn(VOCABULARY, generator=g, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    log_pi, log_old, log_start = (v.log_softmax(-1) for v in (z, old, start))
    estimate = kl_estimate(
        logp=log_pi,
        reference_logp=log_start,
        old_logp=log_old,
        mask=torch.ones(VOCABULARY),
        estimator=estimator,
        unbiased_gradient=True,
    )
    (found,) = torch.autograd.grad((log_old.exp() * estimate).sum(), z, retain_graph=True)
    (exact,) = torch.autograd.grad((log_pi.exp() * (log_pi - log_start)).sum(), z)
    torch.testing.assert_close(found, exact)


def correction(log_ratio, mask=None, **options):
    old = torch.log(torch.tensor([[0.2, 0.5, 0.9, 0.3]], dtype=torch.float64))
    mask = torch.ones(1, 4) if mask is None else mask
    sampler = old - torch.tensor([log_ratio], dtype=torch.float64)
    defaults = {"level": "token", "mode": "mask", "gating": "ratio", "low": 0.5, "high": 2.0}
    return correction_weight(old_logp=old, sampler_logp=sampler, mask=mask, **{**defaults, **options})


def test_correction_masks_or_clips_tokens_by_their_ratio():
    logs = [math.log(x) for x in (0.4, 0.6, 1.5, 3.0)]
    weight, outside = correction(logs)
    torch.testing.assert_close(weight, torch.tensor([[0.0, 0.6, 1.5, 0.0]], dtype=torch.float64))
    assert outside.tolist() == [[True, False, False, True]]
    weight, outside = correction(logs, mode="clip")
    torch.testing.assert_close(weight, torch.tensor([[0.5, 0.6, 1.5, 2.0]], dtype=torch.float64))
    weight, outside = correction([*logs[:3], math.nan], mask=torch.tensor([[1, 1, 1, 0]]))
    assert weight[0, 3] == 1 and not outside[0, 3], "padding may hold anything"


def test_correction_by_sequence_keeps_or_drops_whole_responses():
    kept, outside = correction([math.log(x) for x in (0.4, 3.0, 1.0, 1.0)], level="sequence")
    assert not outside.any()  # geometric mean (0.4 * 3) ** (1/4)
    torch.testing.assert_close(kept, torch.tensor([[0.4, 3.0, 1.0, 1.0]], dtype=torch.float64))
    dropped, outside = correction([math.log(3.0)] * 4, level="sequence")
    assert outside.all() and not dropped.any()


@pytest.mark.parametrize("gating", ["binary_kl", "tv"])
def test_correction_by_divergence_is_bounded_above(gating):
    ratios = (0.999, 0.7, 1.0, 0.5)
    old = [0.2, 0.5, 0.9, 0.3]
    mu = [q / r for q, r in zip(old, ratios, strict=True)]
    twin = {
        "tv": [abs(p - q) for p, q in zip(mu, old, strict=True)],
        "binary_kl": [
            p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)) for p, q in zip(mu, old, strict=True)
        ],
    }[gating]
    bound = sorted(twin)[2] - 1e-9
    weight, outside = correction([math.log(r) for r in ratios], gating=gating, low=0.0, high=bound)
    assert outside.tolist() == [[v > bound for v in twin]] and int(outside.sum()) == 2
    expected = [0.0 if v > bound else r for v, r in zip(twin, ratios, strict=True)]
    torch.testing.assert_close(weight, torch.tensor([expected], dtype=torch.float64))
    with pytest.raises(ValueError, match="clamps the ratio of a token"):
        correction([0.0] * 4, gating=gating, mode="clip")


@pytest.mark.parametrize("name", METHODS)
def test_corrected_samples_of_another_policy_give_the_gradient_of_pi_old(name):
    """By enumeration of the one token that was drawn: E_mu[w gradient] = E_pi_old[gradient], E_mu[w rho f] = E_T[f]."""
    method, s = METHODS[name], reference.Settings()
    tempered = method.samples == "policy+tempered"
    g = torch.Generator().manual_seed(2)
    old, new, mu = (torch.randn(VOCABULARY, generator=g, dtype=torch.float64) for _ in range(3))
    rows = []
    for drawn_hot in (False, True) if tempered else (False,):
        batch = make_batch()
        batch.tokens = [[a] for a in range(VOCABULARY)]
        batch.logits, batch.old_logits = [[new.tolist()]] * VOCABULARY, [[old.tolist()]] * VOCABULARY
        batch.mask, batch.reward = [[1.0]] * VOCABULARY, [float(a % 2) for a in range(VOCABULARY)]
        batch.tempered = [drawn_hot] * VOCABULARY
        rows.append(tensors_of(batch))
    for x in rows:
        hot = bool(x.tempered_rows[0])
        drawn_from = (old / 1.2 if hot else old).log_softmax(-1)  # pi_old, or pi_old^T
        (advantage,) = method_advantage(
            method,
            group_advantage=torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64) * (not hot),
            success=x.reward,
            target_ratio=x.rho,
            entropy=x.old_entropy,
            alpha=s.alpha,
            mixing=s.mixing,
            tempered_rows=x.tempered_rows,
            old_logp=x.old_logp.detach(),
            mask=x.mask,
            sample_weight=s.sample_weight,
            constants=constants_of(s),
        )[:1]
        weight, _ = correction_weight(
            old_logp=drawn_from[:, None],
            sampler_logp=mu.log_softmax(-1)[:, None],
            mask=x.mask,
            level="token",
            mode="mask",
            gating="ratio",
            low=0.0,
            high=1e9,
        )

        def gradient(probability, x=x, advantage=advantage):
            terms = objective_terms(
                logp=x.logp,
                old_logp=x.old_logp,
                advantages=[advantage],
                weight=probability[:, None],
                mask=x.mask,
                **CLIP,
            )
            return torch.autograd.grad(terms.loss_sum, x.logits, retain_graph=True)[0].sum(0)

        corrected, exact = gradient(mu.softmax(-1) * weight[:, 0]), gradient(drawn_from.exp())
        torch.testing.assert_close(corrected, exact)
        assert not torch.allclose(gradient(mu.softmax(-1)), exact, rtol=1e-3), "uncorrected it is another gradient"
    f, rho = torch.rand(VOCABULARY, generator=g, dtype=torch.float64), (old / 1.2).softmax(-1) / old.softmax(-1)
    w = old.softmax(-1) / mu.softmax(-1)
    torch.testing.assert_close((mu.softmax(-1) * w * rho * f).sum(), ((old / 1.2).softmax(-1) * f).sum())


def test_kl_estimates_are_bounded():
    far = {"old_logp": torch.zeros(2), "mask": torch.ones(2), "reference_logp": torch.tensor([0.0, -90.0])}
    logp = torch.tensor([-90.0, 0.0], requires_grad=True)
    for estimator in ("k1", "k2", "k3"):
        value = kl_estimate(logp=logp, estimator=estimator, **far)
        assert value.abs().max() <= 10 and torch.isfinite(torch.autograd.grad(value.sum(), logp)[0]).all()


def test_the_twin_batch_reaches_every_clip():
    x = tensors_of(make_batch())
    (advantage,) = method_advantage(
        METHODS["grpo"],
        group_advantage=group_advantage(reward=x.reward, group_size=GROUP),
        success=x.reward,
        target_ratio=x.rho,
        alpha=0.0,
        mixing="convex",
    )
    result = clipped_surrogate(
        logp=x.logp,
        old_logp=x.old_logp,
        advantage=advantage,
        mask=x.mask,
        **CLIP,
        dual_clip=1.3,
        aggregation="token_mean",
    )
    assert min(result.clip_fraction_high, result.clip_fraction_low, result.dual_clip_fraction) > 0


def test_every_method_differs_from_grpo():
    for name, method in METHODS.items():
        x = tensors_of(make_batch(tempered=method.samples == "policy+tempered"))
        _, gradient = loss_of(method, x, reference.Settings())
        policy_rows = tensors_of(make_batch())
        _, grpo = loss_of(METHODS["grpo"], policy_rows, reference.Settings())
        assert torch.equal(gradient, grpo) == (name == "grpo"), name


def test_which_methods_train_on_groups_of_right_responses_alone():
    r_beside_a = {"dcpo", "j1", "j2", "j3", "j4", "dcpo_wo_double_is", "dcpo_expected", "scope_rl"}
    assert {name for name, method in METHODS.items() if rewards_solved_groups(method)} == r_beside_a


# ---- invariants -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", ["convex", "additive"])
def test_alpha_zero_is_grpo_to_the_bit(mixing):
    s = reference.Settings(alpha=0.0, mixing=mixing)
    grpo_loss, grpo_gradient = loss_of(METHODS["grpo"], tensors_of(make_batch()), reference.Settings(mixing=mixing))
    for name in ("dcpo", "j1", "j3", "dcpo_wo_double_is", "dcpo_wo_reinforce", "dcpo_expected"):
        loss, gradient = loss_of(METHODS[name], tensors_of(make_batch()), s)
        assert torch.equal(loss, grpo_loss) and torch.equal(gradient, grpo_gradient), name


def test_alpha_zero_advantage_is_the_group_advantage_to_the_bit():
    a = group_advantage(reward=torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), group_size=5)
    rho = torch.rand(5, 3) * 4
    mixed = mixed_advantage(group_advantage=a, success=(a > 0).float(), target_ratio=rho, alpha=0.0, mixing="convex")
    assert torch.equal(mixed, a[:, None].expand(5, 3))


@pytest.mark.parametrize("mixing", ["convex", "additive"])
def test_dcpo_equals_j3_for_binary_success(mixing):
    s = reference.Settings(mixing=mixing)
    loss, gradient = loss_of(METHODS["dcpo"], tensors_of(make_batch()), s)
    other_loss, other_gradient = loss_of(METHODS["j3"], tensors_of(make_batch()), s)
    torch.testing.assert_close(loss, other_loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient, other_gradient, rtol=0, atol=1e-14)


logit_rows = st.lists(st.floats(-30.0, 30.0), min_size=2, max_size=40)


@given(logits=logit_rows, temperature=st.floats(0.5, 4.0))
@settings(max_examples=200, deadline=None)
def test_target_ratio_has_mean_one_under_the_policy(logits, temperature):
    z = torch.tensor(logits, dtype=torch.float64)[None, :]
    old_logp, tempered_logp = z.log_softmax(-1), (z / temperature).log_softmax(-1)
    rho = target_ratio(old_logp=old_logp, tempered_logp=tempered_logp, mask=torch.ones_like(z))
    assert (old_logp.exp() * rho).sum().item() == pytest.approx(1.0, abs=1e-12)


@given(logits=logit_rows)
@settings(deadline=None)
def test_target_ratio_is_one_at_temperature_one(logits):
    z = torch.tensor(logits, dtype=torch.float64)[None, :]
    rho = target_ratio(old_logp=z.log_softmax(-1), tempered_logp=(z / 1.0).log_softmax(-1), mask=torch.ones_like(z))
    assert torch.equal(rho, torch.ones_like(rho))


def test_target_ratio_reads_nothing_outside_the_mask():
    tempered, mask = torch.tensor([[-1.0, float("nan")]]), torch.tensor([[True, False]])
    rho = target_ratio(old_logp=torch.tensor([[-2.0, 5.0]]), tempered_logp=tempered, mask=mask)
    torch.testing.assert_close(rho, torch.tensor([[math.e, 1.0]]))


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_padding_and_its_content_change_nothing(aggregation):
    x, pad = tensors_of(make_batch()), 3
    advantage = torch.randn(x.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given_tensors = {"logp": x.logp, "old_logp": x.old_logp, "advantage": advantage}
    plain = clipped_surrogate(**given_tensors, mask=x.mask, **CLIP, aggregation=aggregation)
    outside = torch.cat([x.mask == 0, torch.ones(len(x.mask), pad, dtype=torch.bool)], 1)
    padded = {
        name: torch.nn.functional.pad(value, (0, pad)).masked_fill(outside, float("nan"))
        for name, value in given_tensors.items()
    }
    other = clipped_surrogate(**padded, mask=~outside, **CLIP, aggregation=aggregation)
    for field in dataclasses.fields(plain):
        torch.testing.assert_close(getattr(other, field.name), getattr(plain, field.name), rtol=0, atol=1e-12)
    (plain_gradient,) = torch.autograd.grad(plain.loss, x.logits, retain_graph=True)
    (other_gradient,) = torch.autograd.grad(other.loss, x.logits)
    torch.testing.assert_close(other_gradient, plain_gradient, rtol=0, atol=1e-15)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("splits", [[16], [4, 12], [1, 2, 3, 10], [6, 6, 4]])
def test_micro_batch_split_changes_nothing(aggregation, splits):
    x = tensors_of(make_batch())
    advantage = torch.randn(x.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = clipped_surrogate(
        logp=x.logp, old_logp=x.old_logp, advantage=advantage, mask=x.mask, **CLIP, aggregation=aggregation
    )
    pieces = zip(
        x.logp.split(splits), x.old_logp.split(splits), advantage.split(splits), x.mask.split(splits), strict=True
    )
    parts = [
        clipped_surrogate(logp=logp, old_logp=old_logp, advantage=a, mask=m, **CLIP, aggregation=aggregation)
        for logp, old_logp, a, m in pieces
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    for name in ("loss", "clip_fraction_high", "clip_fraction_low", "approx_kl", "denominator", "token_count"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name), rtol=0, atol=1e-13)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_packed_tokens_give_the_padded_loss(aggregation):
    x = tensors_of(make_batch())
    advantage = torch.randn(x.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    padded = clipped_surrogate(
        logp=x.logp, old_logp=x.old_logp, advantage=advantage, mask=x.mask, **CLIP, aggregation=aggregation
    )
    inside, weight = x.mask.bool(), token_weight(mask=x.mask, aggregation=aggregation)
    packed = surrogate_terms(
        logp=x.logp[inside],
        old_logp=x.old_logp[inside],
        advantage=advantage[inside],
        weight=weight[inside],
        mask=x.mask[inside],
        **CLIP,
    )
    for field in dataclasses.fields(packed):
        torch.testing.assert_close(getattr(packed, field.name), getattr(padded, field.name), rtol=0, atol=1e-13)


@given(order=st.permutations(range(4)))
@settings(max_examples=24, deadline=None)
def test_permuting_groups_changes_nothing(order):
    batch, s = make_batch(), reference.Settings()
    rows = [GROUP * g + i for g in order for i in range(GROUP)]
    permuted = dataclasses.replace(
        batch,
        **{n: [getattr(batch, n)[i] for i in rows] for n in ("logits", "old_logits", "tokens", "mask", "reward")},
    )
    loss, gradient = loss_of(METHODS["dcpo"], tensors_of(batch), s)
    other_loss, other_gradient = loss_of(METHODS["dcpo"], tensors_of(permuted), s)
    torch.testing.assert_close(other_loss, loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(other_gradient, gradient[rows], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("splits", [[4, 12], [1, 2, 3, 10], [6, 6, 4]])
def test_tokens_are_chosen_once_for_all_micro_batches(name, splits):
    """What an update chose before its rows were dealt and split adds up to the loss and gradient of the whole."""
    method, s, x = METHODS[name], reference.Settings(), tensors_of(make_batch())
    a = group_advantage(reward=x.reward, group_size=GROUP)
    tokens = {"old_logp": x.old_logp.detach(), "mask": x.mask, "constants": constants_of(s)}
    given_values = {"success": x.reward, "target_ratio": x.rho, "alpha": 0.0, "mixing": "convex", "seed": LOTS}
    (advantage,) = method_advantage(method, group_advantage=a, **given_values, **tokens)
    penalty = penalty_weight(method, group_advantage=a, **tokens)
    penalty = torch.zeros_like(advantage) if penalty is None else penalty
    weight = token_weight(mask=x.mask, aggregation="sequence_mean")
    pieces = zip(*(v.split(splits) for v in (x.logp, x.old_logp, advantage, weight, x.mask, penalty)), strict=True)
    parts = [
        objective_terms(logp=l, old_logp=o, advantages=(d,), weight=w, mask=m, **CLIP, penalty_weight=p).loss_sum
        for l, o, d, w, m, p in pieces  # noqa: E741
    ]
    loss = sum(parts) / loss_denominator(mask=x.mask, aggregation="sequence_mean")
    (gradient,) = torch.autograd.grad(loss, x.logits)
    twin_loss, twin_gradient = reference.loss_and_gradient(name, make_batch(), s)
    torch.testing.assert_close(loss.item(), twin_loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.tensor(twin_gradient, dtype=torch.float64), rtol=0, atol=1e-12)


@given(order=st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_groups_and_padding_do_not_change_what_kl_cov_holds(order):
    x, s = tensors_of(make_batch()), reference.Settings()
    rows = [GROUP * g + i for g in order for i in range(GROUP)]
    a, old_logp = group_advantage(reward=x.reward, group_size=GROUP), x.old_logp.detach()
    held = penalty_weight(
        METHODS["kl_cov"], group_advantage=a, old_logp=old_logp, mask=x.mask, constants=constants_of(s)
    )
    padded = torch.nn.functional.pad(old_logp.masked_fill(x.mask == 0, math.nan), (0, 3), value=math.nan)[rows]
    mask = torch.nn.functional.pad(x.mask, (0, 3))[rows]
    other = penalty_weight(
        METHODS["kl_cov"], group_advantage=a[rows], old_logp=padded, mask=mask, constants=constants_of(s)
    )
    assert held is not None and other is not None and int((held > 0).sum()) == int(0.1 * x.mask.sum())
    assert torch.equal(other[:, :-3], held[rows]) and not other[:, -3:].any()


def test_kl_cov_has_no_gradient_of_its_own_where_the_policy_is_still_pi_old():
    batch, s = make_batch(), reference.Settings()
    batch = dataclasses.replace(batch, logits=batch.old_logits)
    _, gradient = loss_of(METHODS["kl_cov"], tensors_of(batch), s)
    _, grpo = loss_of(METHODS["grpo"], tensors_of(batch), s)
    assert torch.equal(gradient, grpo)


def test_covariance_by_hand_and_tokens_of_high_covariance_lower_the_entropy():
    advantage = torch.tensor([[1.0, 1.0], [-1.0, 5.0]])
    logp, mask = torch.tensor([[-1.0, -3.0], [-2.0, math.nan]]), torch.tensor([[1, 1], [1, 0]])
    covariance = token_covariance(advantage=advantage, logp=logp, mask=mask)  # means 1/3 and -2
    expected = torch.tensor([[2 / 3, -2 / 3], [0.0, -math.inf]], dtype=torch.float64)
    torch.testing.assert_close(covariance, expected)

    z = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    pi, a = z.softmax(0), torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    entropy = lambda z: -(z.softmax(0) * z.log_softmax(0)).sum()  # noqa: E731
    exact = (pi * a * pi.log()).sum() - (pi * a).sum() * (pi * pi.log()).sum()  # Cov_pi(A, log pi)
    natural = (entropy(z + 1e-6 * a) - entropy(z)) / 1e-6  # a step along A in the logits
    torch.testing.assert_close(natural, -exact, rtol=1e-4, atol=0)


def test_constants_are_the_schemas_defaults():
    defaults = RecipeMethod()
    assert dataclasses.asdict(Constants()) == {f.name: getattr(defaults, f.name) for f in dataclasses.fields(Constants)}


def test_minus_mean_logp_has_no_expected_gradient_so_it_is_no_entropy_bonus():
    z = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    log_pi = z.log_softmax(-1)
    (sampled,) = torch.autograd.grad(-(log_pi.exp().detach() * log_pi).sum(), z, retain_graph=True)
    (exact,) = torch.autograd.grad(-(log_pi.exp() * log_pi).sum(), z)
    assert sampled.abs().max() < 1e-15 < exact.abs().max()


# ---- the pieces, by hand --------------------------------------------------------------------------------------------


def test_group_advantage_by_hand():
    a = group_advantage(reward=torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), group_size=4)
    torch.testing.assert_close(a, torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_group_advantage_of_equal_rewards_is_exactly_zero(reward):
    assert torch.equal(group_advantage(reward=torch.full((21,), reward), group_size=7), torch.zeros(21))


@pytest.mark.parametrize(
    ("reward", "group_size", "message"),
    [
        ([1.0, 0.0], 1, "at least 2, got 1"),
        ([1.0, 0.0, 1.0], 2, "3 rewards is not whole groups of 2"),
        ([1.0, float("nan")], 2, r"rows \[1\] hold \[nan\]"),
        ([float("inf"), 0.0], 2, r"rows \[0\] hold \[inf\]"),
    ],
)
def test_group_advantage_refuses(reward, group_size, message):
    with pytest.raises(ValueError, match=message):
        group_advantage(reward=torch.tensor(reward), group_size=group_size)


def test_mixed_advantage_by_hand():
    given_values = {
        "group_advantage": torch.tensor([1.0, -2.0]),
        "success": torch.tensor([1.0, 0.0]),
        "target_ratio": torch.tensor([[2.0, 0.5], [9.0, 9.0]]),
        "alpha": 0.25,
    }
    additive = mixed_advantage(**given_values, mixing="additive")
    torch.testing.assert_close(additive, torch.tensor([[1.5, 1.125], [-2.0, -2.0]]))
    convex = mixed_advantage(**given_values, mixing="convex")  # w = 0.2
    torch.testing.assert_close(convex, torch.tensor([[1.2, 0.9], [-1.6, -1.6]]))


@pytest.mark.parametrize(
    ("alpha", "mixing", "message"),
    [
        (-0.1, "convex", "finite and >= 0, got -0.1"),
        (float("nan"), "additive", "finite and >= 0, got nan"),
        (float("inf"), "convex", "finite and >= 0, got inf"),
    ],
)
def test_mixing_refuses(alpha, mixing, message):
    with pytest.raises(ValueError, match=message):
        mixing_weights(alpha=alpha, mixing=mixing)


def test_surrogate_by_hand():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0, 3.0]], dtype=torch.float64)
    logp = ratio.log().requires_grad_()
    result = clipped_surrogate(
        logp=logp,
        old_logp=torch.zeros_like(ratio),
        advantage=advantage,
        mask=torch.ones(1, 5, dtype=torch.bool),
        clip_low=0.2,
        clip_high=0.3,
        aggregation="token_mean",
    )
    # min[r A, clip(r, 0.8, 1.3) A] = 1.3, -1.5, 0.5, -0.8, 3
    assert result.loss.item() == pytest.approx(-(1.3 - 1.5 + 0.5 - 0.8 + 3.0) / 5)
    assert (result.clip_high_sum, result.clip_low_sum, result.dual_clip_sum, result.token_count) == (1, 1, 0, 5)
    (gradient,) = torch.autograd.grad(result.loss_sum, logp)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 1.5, -0.5, 0.0, -3.0]], dtype=torch.float64))
    assert result.approx_kl.item() == pytest.approx(-ratio.log().mean().item())


def test_sequence_mean_weighs_rows_alike_and_token_mean_tokens():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    given_tensors = {
        "logp": torch.zeros(3, 4),
        "old_logp": torch.zeros(3, 4),
        "advantage": torch.tensor([[1.0], [6.0], [100.0]]).expand(3, 4),
        "mask": mask,
    }
    rows = clipped_surrogate(**given_tensors, **CLIP, aggregation="sequence_mean")
    tokens = clipped_surrogate(**given_tensors, **CLIP, aggregation="token_mean")
    assert (rows.denominator, tokens.denominator) == (2, 5)
    assert rows.loss.item() == pytest.approx(-3.5) and tokens.loss.item() == pytest.approx(-2.0)


def test_a_batch_without_tokens_has_loss_zero():
    nothing = torch.zeros(2, 3)
    result = clipped_surrogate(
        logp=nothing, old_logp=nothing, advantage=nothing, mask=nothing.bool(), **CLIP, aggregation="sequence_mean"
    )
    assert result.loss == 0 and result.approx_kl == 0 and result.denominator == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"dual_clip": 1.0}, "dual_clip must be above 1, got 1.0"),
        ({"clip_low": 1.1}, "0 <= clip_low <= 1"),
        ({"clip_high": -0.1}, "clip_high >= 0"),
    ],
)
def test_surrogate_refuses(override, message):
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        clipped_surrogate(
            logp=x, old_logp=x, advantage=x, mask=x.bool(), **{**CLIP, **override}, aggregation="token_mean"
        )


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_population_scale_averages_each_origin_apart(aggregation):
    mask = (torch.arange(4) < torch.tensor([[4], [2], [1]])).double()
    tempered = torch.tensor([False, True, False])
    scale = population_scale(mask=mask, tempered_rows=tempered, aggregation=aggregation)
    weight = token_weight(mask=mask, aggregation=aggregation) * scale[:, None]
    share = weight / loss_denominator(mask=mask, aggregation=aggregation)
    assert share[tempered].sum().item() == pytest.approx(1.0) and share[~tempered].sum().item() == pytest.approx(1.0)
    alone = population_scale(mask=mask, tempered_rows=torch.zeros(3, dtype=torch.bool), aggregation=aggregation)
    assert torch.equal(alone, torch.ones_like(alone))


def test_aepo_rows_are_the_first_with_a_positive_advantage():
    advantage = torch.tensor([0.0, 1.5, -0.5, 0.06, 0.04, 0.9])
    assert aepo_rows(group_advantage=advantage, above_target=False).tolist() == [1, 3, 5]
    assert aepo_rows(group_advantage=advantage, above_target=True).tolist() == [1]
    assert aepo_rows(group_advantage=advantage, above_target=False, limit=2).tolist() == [1, 3]


def test_methods_refuse_what_they_cannot_use():
    a, rho = torch.zeros(2), torch.ones(2, 3)
    given_values = {"group_advantage": a, "success": a, "target_ratio": rho, "alpha": 0.1, "mixing": "convex"}
    with pytest.raises(ValueError, match="entropy_adv needs the entropy"):
        method_advantage(METHODS["entropy_adv"], **given_values)
    with pytest.raises(ValueError, match="clip_cov needs log pi_old and the mask"):
        method_advantage(METHODS["clip_cov"], **given_values, old_logp=rho)
    with pytest.raises(ValueError, match="entropic needs log pi_old"):
        method_advantage(METHODS["entropic"], **given_values)
    with pytest.raises(ValueError, match="got 1 tempered rows"):
        method_advantage(METHODS["dcpo"], **given_values, tempered_rows=torch.tensor([True, False]))


def test_a_new_method_is_a_row_and_one_function():
    def failures_too(x):
        """S(A + alpha rho (2 R - 1))."""
        return (x.advantage_weight * x.advantage + x.regulariser_weight * x.ratio_weight * (2 * x.success - 1),)

    mine = Method(equation="avg S(A + α ρ (2R - 1))", ratio_weight="rho", mix=failures_too, uses_alpha=True)
    (advantage,) = method_advantage(
        mine,
        group_advantage=torch.zeros(2),
        success=torch.tensor([1.0, 0.0]),
        target_ratio=torch.full((2, 1), 2.0),
        alpha=0.5,
        mixing="additive",
    )
    assert advantage.tolist() == [[1.0], [-1.0]]
