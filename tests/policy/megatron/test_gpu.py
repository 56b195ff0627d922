"""One GPU against the CPU: statistics, gradients and updates of every architecture, memory, offload, resume."""

import gc
import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from dcpo_openrlhf.policy.megatron.checkpoint import PolicyCheckpoint
from dcpo_openrlhf.policy.megatron.mesh import close_mesh
from dcpo_openrlhf.policy.megatron.model import hf_tensors
from dcpo_openrlhf.policy.token_stats import token_stats
from dcpo_openrlhf.recipe import packages
from tests.policy.megatron.common import make_policy, make_step, random_rows
from tests.tiny import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe")
TEMPERATURES = [0.8, 1.2]
# what the CPU's own bf16 keeps of its fp32 on these models, with a little room
BF16_MEAN, BF16_NORM, BF16_COSINE = 0.03, 0.1, 0.9
"""Mean difference of a statistic [nats], relative one of the gradient's norm, cosine of a parameter's gradient."""


class Numbers(NamedTuple):
    statistics: dict[str, Tensor]
    metrics: list[dict[str, float]]
    gradients: dict[str, Tensor]
    """Of the last update, by the names of the Hugging Face tensors that a parameter holds."""
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {a: make_tiny_model(folder / a, architecture=a, tie=a == "llama") for a in ARCHITECTURES}


def in_process(device: str, fn: Callable[..., Any], *arguments: Any) -> Any:
    """fn(device, *arguments) in a process of its own; for device = cpu one that sees no GPU.

    Transformer Engine cannot be imported without a GPU.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    seen = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    begin = "import sys; sys.modules['transformer_engine'] = None" if device == "cpu" else ""
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, rendezvous | seen),
        ProcessPoolExecutor(1, mp_context=context, initializer=exec, initargs=(begin,)) as pool,
    ):
        return pool.submit(fn, device, *arguments).result()


def make(device: str, path: Path, *, step: dict[str, Any] | None = None, **policy: Any) -> Any:
    close_mesh()
    gc.collect()
    if device == "cuda":
        policy.setdefault("layers", layers_here()[-1])
    return make_step(make_policy(path, rank=0, world_size=1, device=device, **policy), **(step or {}))


def _numbers(device: str, models: dict[str, Path], step: dict[str, Any], policy: dict[str, Any]) -> dict[str, Numbers]:
    """{architecture: numbers of two updates}."""
    found = {}
    for name, path in models.items():
        trainer = make(device, path, step=step, **policy)
        statistics = trainer.token_statistics(random_rows(), temperatures=TEMPERATURES)
        metrics = [trainer.update(random_rows(seed=seed), entropy_coefficient=0.1) for seed in (0, 1)]
        gradients = {"+".join(e.hf_names): p.main_grad.float().cpu().clone() for e, p in trainer.policy.entries()}
        found[name] = Numbers(statistics, metrics, gradients, _weights(trainer))
    return found


def _weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.float().cpu().clone() for name, value in hf_tensors(trainer.policy)}


def layers_here() -> list[str]:
    return ["local", *["transformer_engine"] * (packages.version(packages.TE) is not None)]


@pytest.fixture(scope="module")
def on_cpu(models: dict[str, Path]) -> dict[str, Numbers]:
    """What the CPU's tests hold to every mesh, in fp32."""
    return in_process("cpu", _numbers, models, {}, {})


@pytest.mark.parametrize("step", [{"micro_batch_size": 2}, {"micro_batch_tokens": 60}], ids=["rows", "packed"])
def test_fp32_update_equals_that_of_the_cpu(models: dict[str, Path], on_cpu: dict[str, Numbers], step: dict) -> None:
    found = in_process("cuda", _numbers, models, step, {"layers": "local"})
    for name, wanted in on_cpu.items():
        for key, value in wanted.statistics.items():
            torch.testing.assert_close(found[name].statistics[key], value, atol=1e-4, rtol=1e-4, msg=f"{name} {key}")
        for seen, metrics in zip(found[name].metrics, wanted.metrics, strict=True):
            assert seen == pytest.approx(metrics, rel=1e-4, abs=1e-5), name
        for key, value in wanted.weights.items():
            torch.testing.assert_close(found[name].weights[key], value, atol=1e-4, rtol=1e-4, msg=f"{name} {key}")


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_bf16_gradient_points_where_that_of_the_cpu_does(
    models: dict[str, Path], on_cpu: dict[str, Numbers], layers: str, recompute: str
) -> None:
    if layers not in layers_here():
        pytest.skip("needs Transformer Engine")
    policy = {"layers": layers, "dtype": "bf16", "recompute": recompute}
    found = in_process("cuda", _numbers, models, {"micro_batch_tokens": 60}, policy)
    for name, wanted in on_cpu.items():
        seen = found[name]
        for key, value in wanted.statistics.items():
            assert (seen.statistics[key] - value).abs().mean() < BF16_MEAN, f"{name} {key}"
        for numbers, metrics in zip(seen.metrics, wanted.metrics, strict=True):
            assert numbers["policy/grad_norm"] == pytest.approx(metrics["policy/grad_norm"], rel=BF16_NORM), name
        for key, value in wanted.gradients.items():
            cosine = torch.cosine_similarity(seen.gradients[key].flatten(), value.flatten(), dim=0)
            assert cosine > BF16_COSINE, f"{name} {key}"


def _with_and_without_fused_rotary(device: str, path: Path) -> Any:
    found = []
    for fused in (True, False):
        trainer = make(device, path, layers="local")
        assert trainer.policy.config.apply_rope_fusion
        trainer.policy.config.apply_rope_fusion = fused
        found.append(
            (trainer.token_statistics(random_rows(), temperatures=TEMPERATURES), trainer.update(random_rows()))
        )
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_fused_rotary_embedding_gives_the_same_numbers(models: dict[str, Path], architecture: str) -> None:
    if "transformer_engine" not in layers_here():
        pytest.skip("it is Transformer Engine's")
    fused, own = in_process("cuda", _with_and_without_fused_rotary, models[architecture])
    for key, value in own[0].items():
        torch.testing.assert_close(fused[0][key], value, atol=1e-5, rtol=1e-5, msg=key)
    assert fused[1] == pytest.approx(own[1], rel=1e-4, abs=1e-6)


def _grouped_and_looped(device: str, path: Path, folder: Path) -> Any:
    """Statistics, update and weights with one multiply for all experts and with a loop over them, and a checkpoint of
    the first as the second loads it.
    """
    from dcpo_openrlhf.policy.megatron import model

    found, made = [], model.transformer_config
    for grouped in (True, False):

        def config(*arguments: Any, grouped: bool = grouped, **options: Any) -> Any:
            configured = made(*arguments, **options)
            configured.moe_grouped_gemm = grouped
            return configured

        with mock.patch.object(model, "transformer_config", config):
            trainer = make(device, path, layers="transformer_engine", dtype="bf16")
        assert any("experts.linear_fc1.weight0" in n for n, _ in trainer.policy.chunks[0].named_parameters()) == grouped
        read = _weights(trainer)
        statistics = trainer.token_statistics(random_rows(), temperatures=TEMPERATURES)
        found.append((read, statistics, trainer.update(random_rows()), _weights(trainer)))
        checkpoint = PolicyCheckpoint(trainer)
        if grouped:
            checkpoint.save(folder)
            checkpoint.finish()
        else:
            checkpoint.load(folder)
            found.append((_weights(trainer),))
    return found


def test_grouped_experts_are_the_looped_ones(models: dict[str, Path], tmp_path: Path) -> None:
    if "transformer_engine" not in layers_here():
        pytest.skip("needs Transformer Engine")
    grouped, looped, (loaded,) = in_process("cuda", _grouped_and_looped, models["qwen3_moe"], tmp_path)
    assert all(torch.equal(grouped[0][key], value) for key, value in looped[0].items()), "the names' table, both ways"
    for key, value in looped[1].items():
        assert (grouped[1][key] - value).abs().mean() < BF16_MEAN, key
    assert grouped[2]["policy/grad_norm"] == pytest.approx(looped[2]["policy/grad_norm"], rel=BF16_NORM)
    assert all(torch.equal(loaded[key], value) for key, value in grouped[3].items())


def _saved_and_resumed(device: str, path: Path, folder: Path) -> Any:
    trainer = make(device, path, dtype="bf16")
    trainer.update(random_rows(seed=0))
    checkpoint = PolicyCheckpoint(trainer)
    checkpoint.save(folder)
    through = trainer.update(random_rows(seed=1)), _weights(trainer)  # while the thread writes
    checkpoint.finish()
    trainer = make(device, path, dtype="bf16")
    PolicyCheckpoint(trainer).load(folder)
    return through, (trainer.update(random_rows(seed=1)), _weights(trainer))


def test_resumed_update_is_that_of_the_run_bit_for_bit(models: dict[str, Path], tmp_path: Path) -> None:
    (metrics, weights), (resumed, same) = in_process("cuda", _saved_and_resumed, models["qwen2"], tmp_path)
    assert resumed == metrics
    assert all(torch.equal(same[key], value) for key, value in weights.items())


def _away_and_back(device: str, path: Path) -> Any:
    from dcpo_openrlhf.policy.megatron.memory import Offload

    trainer = make(device, path, dtype="bf16")
    trainer.update(random_rows(seed=0))
    offload, held, taken = Offload(trainer), [], []
    for move in (lambda: None, offload.away, offload.back, offload.away, offload.back):
        move()
        gc.collect()
        held.append(torch.cuda.memory_allocated())
        hosts = [host for _, host in offload._host if not isinstance(host, int)]
        taken += [{host.data_ptr() for host in hosts}] if hosts else []
        assert all(torch.empty(0, dtype=torch.uint8).set_(host).is_pinned() for host in hosts)
    assert taken[0] == taken[1], "host memory is taken once"
    moved = trainer.update(random_rows(seed=1)), _weights(trainer)
    trainer = make(device, path, dtype="bf16")
    trainer.update(random_rows(seed=0))
    parameters = sum(p.numel() for p in trainer.policy.chunks[0].parameters())
    return parameters, held, moved, (trainer.update(random_rows(seed=1)), _weights(trainer))


def test_policy_in_host_memory_leaves_the_device_and_comes_back_the_same(models: dict[str, Path]) -> None:
    parameters, held, (metrics, weights), (stayed, same) = in_process("cuda", _away_and_back, models["llama"])
    before, away, back = held[:3]
    assert back == before and held[3:] == [away, back]
    assert before - away >= 18 * parameters, "bf16 weights, fp32 gradients, fp32 weights and two moments"
    assert metrics == stayed
    assert all(torch.equal(same[key], value) for key, value in weights.items())


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_offloaded_optimizer_makes_the_same_update(models: dict[str, Path], share: float) -> None:
    if "transformer_engine" not in layers_here():
        pytest.skip("megatron-core offloads with Transformer Engine's Adam alone")
    one = {"llama": models["llama"]}
    policy = {"layers": "local", "dtype": "bf16"}
    stayed, moved = (in_process("cuda", _numbers, one, {"cpu_offload": s}, policy)["llama"] for s in (0.0, share))
    for seen, metrics in zip(moved.metrics, stayed.metrics, strict=True):
        assert seen == pytest.approx(metrics, rel=1e-3, abs=1e-5)
    for key, value in stayed.weights.items():
        torch.testing.assert_close(moved.weights[key], value, atol=1e-3, rtol=1e-2, msg=key)  # bf16, rounded once


def _token_statistics(device: str, vocab_size: int) -> Any:
    g = torch.Generator(device).manual_seed(0)
    logits = (4 * torch.randn(300, vocab_size, generator=g, device=device)).bfloat16()
    targets = torch.randint(vocab_size, (300,), generator=g, device=device)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    stats = token_stats(leaf, targets, vocab_size=vocab_size, temperatures=TEMPERATURES, entropy_grad=True)
    logp = exact.log_softmax(-1)
    chosen, entropy = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    tempered = [(exact / t).log_softmax(-1).gather(1, targets[:, None]) for t in TEMPERATURES]
    (stats.logp + stats.entropy).sum().backward()
    (chosen + entropy).sum().backward()
    pairs = [(stats.logp, chosen), (stats.entropy, entropy), (stats.tempered_logp, torch.cat(tempered, 1))]
    grads = [t.grad.double().cpu() for t in (leaf, exact) if t.grad is not None]
    return [(a.detach().double().cpu(), b.detach().cpu()) for a, b in pairs], grads


def test_token_statistics_are_those_of_float64() -> None:
    pairs, (gradient, exact) = in_process("cuda", _token_statistics, 151936)
    for value, wanted in pairs:
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(gradient, exact, atol=1e-2, rtol=1e-2)  # the logits' gradient is bf16 as they are


def _peak(device: str, path: Path, layers: str, recompute: str, tokens: int) -> tuple[float, str]:
    """Bytes that one update of full rows holds at most, over those that memory.py expects without its reserve."""
    from dcpo_openrlhf.policy.rows import Rows
    from dcpo_openrlhf.recipe import memory
    from dcpo_openrlhf.recipe.load import load_recipe

    root = Path(__file__).parents[3]
    overrides = [f"model.path={path}", f"model.layers={layers}", f"train.recompute={recompute}"]
    overrides += ["parallel.devices_per_node=1", "parallel.tensor=1", "parallel.sequence_parallel=false"]
    overrides += ["rollout.engines=1", "rollout.tensor_parallel=1", f"train.micro_batch_tokens={tokens}"]
    recipe = load_recipe(root / "recipes" / "dcpo-qwen2.5-math-7b-8xa800.yaml", overrides)
    sizes = memory.Sizes.of(json.loads((path / "config.json").read_text()))
    expected = memory.trainer_memory(sizes, recipe)
    time = 1024
    attention = torch.ones(tokens // time, time, dtype=torch.bool)
    sequences = torch.randint(0, sizes.vocab, attention.shape)
    logp = torch.full((len(attention), time - 1), -5.0)
    rows = Rows(sequences, attention, attention[:, 1:], logp, (torch.randn(len(logp), 1).expand_as(logp).contiguous(),))
    trainer = make(device, path, step={"micro_batch_tokens": tokens}, dtype="bf16", layers=layers, recompute=recompute)
    trainer.update(rows)
    torch.cuda.reset_peak_memory_stats()
    trainer.update(rows)
    peak = torch.cuda.max_memory_allocated()
    wanted = expected.total - memory.RESERVE["cuda"]
    return peak / wanted, f"{layers}, recompute {recompute}: {peak / 2**30:.2f} GiB, expected {wanted / 2**30:.2f}"


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the shape of Qwen2.5-0.5B with a quarter of its layers."""
    shape = {"hidden": 896, "layers": 6, "heads": 14, "kv_heads": 2, "ffn": 4864, "tie": True}
    folder = tmp_path_factory.mktemp("wide")
    return make_tiny_model(folder, architecture="qwen2", dtype="bfloat16", vocab_size=151936, **shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_peak_memory_is_the_estimated_one(wide_model: Path, layers: str, recompute: str) -> None:
    if layers not in layers_here():
        pytest.skip("needs Transformer Engine")
    ratio, said = in_process("cuda", _peak, wide_model, layers, recompute, 8192)
    assert 0.8 < ratio < 1.2, said
