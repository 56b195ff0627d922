"""Cutting and merging weights is a round trip to the bit, and the table knows every parameter of its models."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dcpo_openrlhf.policy.megatron import names
from tests.tiny import ARCHITECTURE_FIELDS, make_tiny_model

SHAPE = names.Shape(heads=8, kv_heads=4, head_dim=3, vocab_size=10, padded_vocab_size=16)
HIDDEN, WIDTH = 12, 8
SIZES = {
    "embed_tokens.weight": (10, HIDDEN),
    "lm_head.weight": (10, HIDDEN),
    "q_proj.weight": (8 * 3, HIDDEN),
    "k_proj.weight": (4 * 3, HIDDEN),
    "v_proj.weight": (4 * 3, HIDDEN),
    "q_proj.bias": (8 * 3,),
    "k_proj.bias": (4 * 3,),
    "v_proj.bias": (4 * 3,),
    "o_proj.weight": (HIDDEN, 8 * 3),
    "o_proj.bias": (HIDDEN,),
    "gate_proj.weight": (WIDTH, HIDDEN),
    "up_proj.weight": (WIDTH, HIDDEN),
    "down_proj.weight": (HIDDEN, WIDTH),
    "gate.weight": (4, HIDDEN),
    "e_score_correction_bias": (4,),
    "q_norm.weight": (8 * 3,),
    "k_norm.weight": (4 * 3,),
    "q_a_proj.weight": (8, HIDDEN),
    "q_b_proj.weight": (8 * 3, 8),
    "kv_a_proj_with_mqa.weight": (8, HIDDEN),
    "kv_b_proj.weight": (8 * 3, 8),
    "norm.weight": (HIDDEN,),
    "layernorm.weight": (HIDDEN,),
}


def hf_tensors(name: str) -> list[Tensor]:
    """Random tensors of the sizes that `name`'s Hugging Face tensors have."""
    generator = torch.Generator().manual_seed(1)
    sizes = [max((k for k in SIZES if hf.endswith(k)), key=len) for hf in names.TABLE[name][0]]
    return [torch.randn(SIZES[key], generator=generator) for key in sizes]


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("name", names.TABLE)
def test_cut_and_merge_is_a_round_trip_to_the_bit(name: str, tensor: int) -> None:
    cut, hf = names.TABLE[name][1], hf_tensors(name)
    shards = [cut.shard(hf, rank, tensor, SHAPE) for rank in range(tensor)]
    merged = cut.merge([shard.clone() for shard in shards], SHAPE)
    assert len(merged) == len(hf)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(merged, hf, strict=True))
    assert len({shard.shape for shard in shards}) == 1, "every rank holds as much"
    if cut.dim is not None:
        whole = cut.shard(hf, 0, 1, SHAPE)
        assert shards[0].shape[cut.dim] * tensor == whole.shape[cut.dim]
        assert torch.cat(shards, cut.dim).numel() == whole.numel()
    else:
        assert all(torch.equal(shard, hf[0]) for shard in shards)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_padded_vocabulary_rows_are_zero_and_last(tensor: int) -> None:
    (rows,) = hf_tensors("output_layer.weight")
    whole = torch.cat([names.VOCABULARY.shard([rows], rank, tensor, SHAPE) for rank in range(tensor)])
    assert whole.shape == (16, HIDDEN)
    assert torch.equal(whole[:10], rows)
    assert not whole[10:].any()


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_qkv_holds_each_group_with_its_own_query_heads(tensor: int) -> None:
    """Megatron's order is, for each key/value head: the query heads that read it, the key, the value."""
    # row r of head h holds the number 10 h + r, keys count from 1000, values from 2000
    q, k, v = (
        torch.tensor([start + 10.0 * h + r for h in range(heads) for r in range(3)])
        for start, heads in ((0, 8), (1000, 4), (2000, 4))
    )
    groups = 4 // tensor
    for rank in range(tensor):
        expected = []
        for group in range(rank * groups, (rank + 1) * groups):
            for start, heads in ((0, (2 * group, 2 * group + 1)), (1000, (group,)), (2000, (group,))):
                expected += [start + 10.0 * head + row for head in heads for row in range(3)]
        assert names.QKV.shard([q, k, v], rank, tensor, SHAPE).tolist() == expected


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_gated_layer_computes_on_each_rank_its_part(tensor: int) -> None:
    """Sum over ranks of down_r (silu(gate_r x) * up_r x) is the whole layer's output: gate and up are cut alike."""
    gate, up = hf_tensors("decoder.layers.{layer}.mlp.linear_fc1.weight")
    (down,) = hf_tensors("decoder.layers.{layer}.mlp.linear_fc2.weight")
    x = torch.arange(HIDDEN) / HIDDEN
    total = torch.zeros(HIDDEN)
    for rank in range(tensor):
        gate_x, up_x = (names.GATE_UP.shard([gate, up], rank, tensor, SHAPE) @ x).chunk(2)
        total += names.COLUMNS.shard([down], rank, tensor, SHAPE) @ (torch.nn.functional.silu(gate_x) * up_x)
    torch.testing.assert_close(total, down @ (torch.nn.functional.silu(gate @ x) * (up @ x)))


@pytest.mark.parametrize("architecture", ARCHITECTURE_FIELDS)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_every_parameter_of_the_model_has_a_row(tmp_path: Path, architecture: str, tie: bool) -> None:
    folder = make_tiny_model(tmp_path, architecture=architecture, layers=2, tie=tie)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        in_model = set(file.keys())
    in_table = {
        hf.format(layer=layer, expert=expert)
        for hf_names, _ in names.TABLE.values()
        for hf in hf_names
        for layer in range(2)
        for expert in range(4)
    }
    assert in_model - in_table == set()
    assert ("lm_head.weight" in in_model) == (not tie)


def test_no_tensor_has_two_rows() -> None:
    listed = [hf for hf_names, _ in names.TABLE.values() for hf in hf_names]
    assert len(listed) == len(set(listed))


def test_layers_and_experts_are_counted_from_the_ranks_first() -> None:
    entry = names.entry_of("decoder.layers.1.self_attention.linear_qkv.bias", first_layer=12)
    assert entry.hf_names == tuple(f"model.layers.13.self_attn.{p}_proj.bias" for p in "qkv")
    assert entry.cut is names.QKV
    expert = "decoder.layers.10.mlp.experts.local_experts.3.linear_fc1.weight"
    assert names.entry_of(expert, first_layer=2, first_expert=8).hf_names == (
        "model.layers.12.mlp.experts.11.gate_proj.weight",
        "model.layers.12.mlp.experts.11.up_proj.weight",
    )


@pytest.mark.parametrize(
    ("fused", "hf"),
    [
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
    ],
)
def test_norms_that_transformer_engine_fuses_have_their_names(fused: str, hf: str) -> None:
    entry = names.entry_of(f"decoder.layers.0.{fused}")
    assert entry.hf_names == (f"model.layers.0.{hf}",) and entry.cut is names.REPLICATED


@pytest.mark.parametrize("linear", ["linear_fc1", "linear_fc2"])
def test_grouped_experts_are_named_as_the_looped_ones(linear: str) -> None:
    where = {"first_layer": 4, "first_expert": 8}
    grouped = names.entry_of(f"decoder.layers.1.mlp.experts.{linear}.weight3", **where)
    assert grouped == names.entry_of(f"decoder.layers.1.mlp.experts.local_experts.3.{linear}.weight", **where)
    assert grouped.expert and all(name.startswith("model.layers.5.mlp.experts.11.") for name in grouped.hf_names)


@pytest.mark.parametrize(
    "name",
    ["decoder.layers.0.mlp.linear_fc1.bias", "module.output_layer.weight", "output_layer.weight2", "decoder.layers.x"],
)
def test_unknown_parameter_is_named(name: str) -> None:
    with pytest.raises(KeyError, match=f"{name}.*not in names.TABLE; add its row"):
        names.entry_of(name)
