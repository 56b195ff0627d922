"""Token statistics against a float64 twin over the whole vocabulary."""

import pytest
import torch
from torch import Tensor

from dcpo_openrlhf.policy import token_stats as module
from dcpo_openrlhf.policy.token_stats import TokenStats, token_stats
from tests.distributed import run_distributed
from tools.bench import peak_extra_bytes

TOKENS, VOCAB, TEMPERATURES, EXPECTED_TEMPERATURE = 13, 40, (0.8, 1.2, 1.0), 1.5
EVERYTHING = {"temperatures": TEMPERATURES, "entropy_grad": True, "expected_temperature": EXPECTED_TEMPERATURE}


def twin(logits: Tensor, targets: Tensor, vocab_size: int) -> TokenStats:
    """The same from whole log-softmaxes in float64; autograd differentiates it."""
    logits = logits.double()[:, :vocab_size]
    logp = logits.log_softmax(-1)
    tempered = [(logits / t).log_softmax(-1).gather(1, targets[:, None])[:, 0].detach() for t in TEMPERATURES]
    weight = (logits / EXPECTED_TEMPERATURE).softmax(-1).detach()
    return TokenStats(
        logp=logp.gather(1, targets[:, None])[:, 0],
        tempered_logp=torch.stack(tempered, 1),
        entropy=-(logp.exp() * logp).sum(-1),
        expected_logp=(weight * logp).sum(-1),
    )


def example(dtype: torch.dtype, *, vocab_size: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [TOKENS, VOCAB], targets below vocab_size in every shard, and an upstream gradient of each output."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)).to(dtype)
    targets = torch.randint(vocab_size, (TOKENS,), generator=generator)
    targets[:2] = torch.tensor([0, vocab_size - 1])
    return logits, targets, torch.randn(3, TOKENS, generator=generator, dtype=torch.float64)


def gradient(stats: TokenStats, upstream: Tensor, logits: Tensor) -> Tensor:
    outputs = torch.stack([stats.logp, stats.entropy, stats.expected_logp])
    return torch.autograd.grad((outputs * upstream.to(outputs.dtype)).sum(), logits)[0]


def expect_close(actual: TokenStats, expected: TokenStats, *, atol: float) -> None:
    for name, value, reference in zip(TokenStats._fields, actual, expected, strict=True):
        torch.testing.assert_close(
            value.double(), reference, atol=atol, rtol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("vocab_size", [VOCAB, 33])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_values_and_gradients_are_those_of_whole_softmaxes(dtype, atol, vocab_size):
    logits, targets, upstream = example(dtype, vocab_size=vocab_size)
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    stats, expected = (
        token_stats(logits, targets, vocab_size=vocab_size, **EVERYTHING),
        twin(exact, targets, vocab_size),
    )
    assert stats.logp.dtype == stats.tempered_logp.dtype == stats.entropy.dtype == dtype
    expect_close(stats, expected, atol=atol)
    grad, exact_grad = gradient(stats, upstream, logits), gradient(expected, upstream, exact)
    torch.testing.assert_close(grad.double(), exact_grad, atol=atol, rtol=atol)
    assert (grad[:, vocab_size:] == 0).all()


def _on_shards(rank: int, world_size: int, dtype: torch.dtype, vocab_size: int) -> tuple[TokenStats, Tensor]:
    logits, targets, upstream = example(dtype, vocab_size=vocab_size)
    mine = logits.chunk(world_size, dim=1)[rank].clone().requires_grad_()
    group = torch.distributed.new_group(list(range(world_size)))
    stats = token_stats(mine, targets, tp_group=group, vocab_size=vocab_size, chunk_tokens=5, **EVERYTHING)
    grad = gradient(stats, upstream, mine)
    return TokenStats(*(value.detach() for value in stats)), grad


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "atol", "vocab_size"),
    # 17 of 40: with 4 shards of 10 the second ends in padding, the last two are nothing else
    [(torch.float32, 1e-5, VOCAB), (torch.float32, 1e-5, 17), (torch.float64, 1e-10, 33)],
)
def test_vocabulary_shards_change_nothing(tp, dtype, atol, vocab_size):
    logits, targets, upstream = example(dtype, vocab_size=vocab_size)
    exact = logits.double().requires_grad_()
    expected = twin(exact, targets, vocab_size)
    ranks = run_distributed(_on_shards, tp, dtype, vocab_size)
    for stats, _ in ranks:
        expect_close(stats, TokenStats(*(value.detach() for value in expected)), atol=atol)
    whole = torch.cat([grad for _, grad in ranks], 1).double()
    torch.testing.assert_close(whole, gradient(expected, upstream, exact), atol=atol, rtol=atol)


def test_bf16_logits_are_computed_in_fp32_and_get_a_bf16_gradient():
    logits, targets, upstream = example(torch.bfloat16)
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    stats, expected = token_stats(logits, targets, **EVERYTHING), twin(exact, targets, VOCAB)
    assert stats.logp.dtype == torch.float32
    expect_close(stats, expected, atol=1e-5)
    grad = gradient(stats, upstream, logits)
    assert grad.dtype == torch.bfloat16
    # the one rounding of the result: 8 bits of significand
    torch.testing.assert_close(grad.double(), gradient(expected, upstream, exact), atol=1e-5, rtol=2**-8)


@pytest.mark.parametrize("chunk_tokens", [1, 4, TOKENS, 1000])
@pytest.mark.parametrize("block", [1, 3 * VOCAB, 2**18])
def test_every_chunk_size_gives_the_same_numbers(monkeypatch, chunk_tokens, block):
    logits, targets, upstream = example(torch.float32)
    logits.requires_grad_()
    whole = token_stats(logits, targets, chunk_tokens=TOKENS, **EVERYTHING)
    whole_grad = gradient(whole, upstream, logits)
    monkeypatch.setattr(module, "_CPU_BLOCK", block)
    stats = token_stats(logits, targets, chunk_tokens=chunk_tokens, **EVERYTHING)
    for value, reference in zip(stats, whole, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient(stats, upstream, logits), whole_grad, atol=1e-6, rtol=1e-6)


def test_logits_of_packed_batches_may_be_strided():
    logits, targets, upstream = example(torch.float64)
    strided = logits.T.contiguous().T.requires_grad_()
    exact = logits.requires_grad_()
    stats, expected = token_stats(strided, targets.int(), **EVERYTHING), twin(exact, targets, VOCAB)
    expect_close(stats, expected, atol=1e-10)
    torch.testing.assert_close(gradient(stats, upstream, strided), gradient(expected, upstream, exact))


def test_entropy_lies_between_0_and_log_vocabulary():
    one_hot = torch.full((1, VOCAB), -1e4).index_fill(1, torch.tensor([3]), 1e4)
    rows = [torch.zeros(1, VOCAB), one_hot, *(scale * torch.randn(50, VOCAB) for scale in (1e-3, 1.0, 30.0))]
    logits = torch.cat(rows)
    entropy = token_stats(logits, torch.zeros(len(logits), dtype=torch.long), temperatures=()).entropy
    limit = torch.tensor(float(VOCAB)).log()
    assert (entropy >= 0).all() and (entropy <= limit * (1 + 1e-6)).all()
    torch.testing.assert_close(entropy[:2], torch.stack([limit, torch.tensor(0.0)]))


def test_temperature_one_is_the_policy_itself_and_its_expectation_minus_the_entropy():
    logits, targets, _ = example(torch.float32)
    stats = token_stats(logits, targets, temperatures=(1.0,), expected_temperature=1.0)
    assert stats.expected_logp is not None
    torch.testing.assert_close(stats.tempered_logp[:, 0], stats.logp, atol=0, rtol=0)
    torch.testing.assert_close(stats.expected_logp, -stats.entropy)


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.2, 3.0])
def test_target_ratio_has_mean_one_under_the_policy(temperature):
    """E_{a ~ pi}[pi^T(a) / pi(a)] = 1: the sum over every token as target."""
    row = 3 * torch.randn(VOCAB, dtype=torch.float64)
    stats = token_stats(row.expand(VOCAB, -1), torch.arange(VOCAB), temperatures=(temperature,))
    ratio = (stats.tempered_logp[:, 0] - stats.logp).exp()
    torch.testing.assert_close((stats.logp.exp() * ratio).sum().item(), 1.0)


@pytest.mark.parametrize("extreme", [1e4, 3e38, float("inf")])
def test_extreme_and_forbidden_logits_stay_finite(extreme):
    logits, targets, upstream = example(torch.float32)
    logits[:, ::3] = -extreme  # -inf: a token that a mask forbids
    if extreme == 1e4:
        logits[:, 5] = extreme
    targets[:] = 5
    logits.requires_grad_()
    stats = token_stats(logits, targets, **EVERYTHING)
    assert all(value.isfinite().all() for value in stats)
    grad = gradient(stats, upstream, logits)
    assert grad.isfinite().all()
    assert (grad[:, ::3] == 0).all()


def test_large_common_offset_costs_no_precision():
    logits, targets, upstream = example(torch.float32)
    logits = (logits * 8).round() / 8  # so that adding 1e4 rounds nothing
    shifted = (logits + 1e4).requires_grad_()
    logits.requires_grad_()
    stats, moved = token_stats(logits, targets, **EVERYTHING), token_stats(shifted, targets, **EVERYTHING)
    for value, reference in zip(moved, stats, strict=True):
        torch.testing.assert_close(value, reference, atol=0, rtol=0)
    torch.testing.assert_close(gradient(moved, upstream, shifted), gradient(stats, upstream, logits), atol=0, rtol=0)


@pytest.mark.parametrize("vocab_size", [VOCAB, 33])
def test_gradcheck(vocab_size):
    logits, targets, _ = example(torch.float64, vocab_size=vocab_size)

    def differentiable(x: Tensor) -> tuple[Tensor, Tensor]:
        stats = token_stats(x, targets[:4], temperatures=TEMPERATURES, entropy_grad=True, vocab_size=vocab_size)
        return stats.logp, stats.entropy

    assert torch.autograd.gradcheck(differentiable, logits[:4].requires_grad_())


def test_what_was_not_asked_for_has_no_gradient_and_no_expectation():
    logits, targets, _ = example(torch.float32)
    stats = token_stats(logits.requires_grad_(), targets, temperatures=TEMPERATURES)
    assert stats.logp.requires_grad
    assert not stats.entropy.requires_grad and not stats.tempered_logp.requires_grad
    assert stats.expected_logp is None
    with torch.no_grad():
        assert not token_stats(logits, targets, temperatures=TEMPERATURES).logp.requires_grad


@pytest.mark.parametrize(("asked", "per_token"), [({}, 3), ({"entropy_grad": True}, 4), (EVERYTHING, 5)])
def test_only_a_few_numbers_per_token_are_kept_besides_the_logits(asked, per_token):
    """targets, peak and sum; the entropy for its gradient; the tempered sum for the expectation's."""
    logits, targets, _ = example(torch.float32)
    logits.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        token_stats(logits, targets, **{"temperatures": TEMPERATURES} | asked)
    by_storage = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in kept}
    assert by_storage.pop(logits.untyped_storage().data_ptr(), None) is not None
    numbers = sum(tensor.numel() for tensor in kept if tensor.untyped_storage().data_ptr() in by_storage)
    assert numbers == per_token * TOKENS
    fp32, int64 = 4, 8
    assert sum(storage.nbytes() for storage in by_storage.values()) == TOKENS * (fp32 * (per_token - 1) + int64)


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_as_large_as_the_logits_is_made_but_their_gradient(monkeypatch, backward):
    tokens, vocab = 512, 1024
    monkeypatch.setattr(module, "_CPU_BLOCK", 8 * vocab // torch.get_num_threads())
    logits = torch.randn(tokens, vocab, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    stats = token_stats(logits, targets, **EVERYTHING)

    def path() -> None:
        if backward:
            (stats.logp + stats.entropy + stats.expected_logp).sum().backward()
        else:
            token_stats(logits.detach(), targets, **EVERYTHING)

    peak = peak_extra_bytes(path, device="cpu")
    gradient_bytes = logits.nbytes if backward else 0
    assert gradient_bytes < peak < gradient_bytes + logits.nbytes / 8


def test_gradient_over_the_logits_is_the_same_and_takes_no_room():
    logits, targets, upstream = example(torch.float32, vocab_size=33)
    reference = logits.clone().requires_grad_()
    expected = gradient(token_stats(reference, targets, vocab_size=33, **EVERYTHING), upstream, reference)
    logits.requires_grad_()
    stats = token_stats(logits, targets, vocab_size=33, overwrite_logits=True, **EVERYTHING)
    grad = gradient(stats, upstream, logits)
    torch.testing.assert_close(grad, expected, atol=0, rtol=0)
    assert grad.data_ptr() == logits.data_ptr()


def test_logits_overwritten_while_still_needed_are_an_error():
    logits, targets, _ = example(torch.float32)
    logits.requires_grad_()
    stats = token_stats(logits, targets, temperatures=(), overwrite_logits=True)
    stats.logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.logp.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.full((TOKENS,), 33)}, r"targets must be in \[0, vocab_size = 33\), got 33 to 33"),
        ({"targets": torch.full((TOKENS,), -100)}, "got -100 to -100"),
        ({"temperatures": (0.0,)}, r"temperatures must be finite and > 0, got \(0.0,\)"),
        ({"expected_temperature": float("nan")}, "temperatures must be finite"),
        ({"vocab_size": VOCAB + 1}, r"vocab_size = 41 must be in \[1, 40\]"),
        ({"chunk_tokens": 0}, "chunk_tokens = 0 must be at least 1"),
    ],
)
def test_impossible_arguments_are_named(change, message):
    logits, targets, _ = example(torch.float32, vocab_size=33)
    arguments = {"targets": targets, "vocab_size": 33, "temperatures": TEMPERATURES} | change
    with pytest.raises(ValueError, match=message):
        token_stats(logits, **arguments)


def test_no_tokens_give_no_statistics():
    logits = torch.empty(0, VOCAB, requires_grad=True)
    stats = token_stats(logits, torch.empty(0, dtype=torch.long), temperatures=TEMPERATURES)
    assert stats.logp.shape == (0,) and stats.tempered_logp.shape == (0, 3)
    assert torch.autograd.grad(stats.logp.sum(), logits)[0].shape == (0, VOCAB)
