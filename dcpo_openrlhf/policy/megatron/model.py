"""The policy: megatron-core's GPTModel made from a Hugging Face folder, weights included."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dcpo_openrlhf.policy.megatron import names
from dcpo_openrlhf.policy.megatron.attention import PackedAttention, te_attention
from dcpo_openrlhf.policy.megatron.config import padded_vocab_size, rope_type, transformer_config
from dcpo_openrlhf.policy.megatron.fused import SwiGLU
from dcpo_openrlhf.policy.megatron.layers import ProjectionNorm, RMSNorm
from dcpo_openrlhf.policy.megatron.mesh import Mesh, tensor_group
from dcpo_openrlhf.recipe.families import Sizes
from dcpo_openrlhf.recipe.schema import Model, Parallel, Train


class Held(NamedTuple):
    """A parameter of the whole model: which pipeline stage and chunk holds it, under which name, of what shape."""

    stage: int
    chunk: int
    name: str
    first_layer: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Policy:
    """This rank's bare GPTModels (several where pipeline stages hold several chunks) and how to name their weights."""

    chunks: list[GPTModel]
    config: TransformerConfig
    sizes: Sizes
    shape: names.Shape
    tied: bool
    mesh: Mesh
    held: list[Held]
    """Every weight of every stage, first layer first; experts stand once, for all expert ranks."""
    first_ranks: dict[tuple[int, int], int]
    """(pipeline stage, expert rank) -> the first of all ranks that stands there."""

    @property
    def dtype(self) -> torch.dtype:
        """Of every parameter."""
        return self.config.params_dtype

    def entries(self) -> Iterator[tuple[names.Entry, Tensor]]:
        """Each weight of this rank with its entry in the table of names."""
        for chunk in self.chunks:
            first_layer = get_transformer_layer_offset(self.config, chunk.vp_stage)
            for name, weight in named_weights(chunk):
                yield self.entry(name, first_layer, self.mesh.expert_rank), weight

    def entry(self, name: str, first_layer: int, expert_rank: int) -> names.Entry:
        experts = (self.config.num_moe_experts or 0) // self.mesh.expert_size
        return names.entry_of(name, first_layer=first_layer, first_expert=expert_rank * experts)


def named_weights(chunk: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that belong to the model."""
    yield from chunk.named_parameters()
    yield from ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith(names.BUFFERS))


def build_policy(*, model: Model, parallel: Parallel, train: Train, mesh: Mesh) -> Policy:
    """This rank's GPTModel with the weights of the Hugging Face folder `model.path`, on the mesh's device."""
    hf = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    config = transformer_config(hf, model=model, parallel=parallel, train=train, device=mesh.device.type)
    sizes = Sizes.of(hf.to_dict())
    shape = names.Shape(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=hf.vocab_size,
        padded_vocab_size=padded_vocab_size(hf.vocab_size, multiple=model.vocab_multiple, tensor=parallel.tensor),
    )
    chunks = [
        _build_chunk(hf, sizes, config, shape, model.layers, mesh, stage) for stage in range(parallel.virtual_pipeline)
    ]
    held, first_ranks = _all_held(chunks, config), _first_ranks(mesh)
    policy = Policy(chunks, config, sizes, shape, hf.tie_word_embeddings, mesh, held, first_ranks)
    load_weights(policy, HFWeights(model.path))
    return policy


def _build_chunk(
    hf: Any, sizes: Sizes, config: TransformerConfig, shape: names.Shape, layers: str, mesh: Mesh, chunk: int
) -> GPTModel:
    virtual = chunk if config.virtual_pipeline_model_parallel_size else None
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(sizes, config, layers, mesh.device.type, virtual),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual),
        parallel_output=True,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_percent=sizes.partial_rotary,
        rotary_base=hf.rope_parameters["rope_theta"],
        vp_stage=virtual,
    ).to(mesh.device)
    if (kind := rope_type(hf)) != "default":
        # transformers' own: megatron-core's llama3 has constants of one model, its yarn another attention factor
        gpt.rotary_pos_emb.inv_freq = ROPE_INIT_FUNCTIONS[kind](hf, mesh.device)[0]
    for parameter in gpt.parameters():  # routers are made in fp32 whatever params_dtype says
        parameter.data = parameter.data.to(config.params_dtype)
    return gpt


def _all_held(chunks: list[GPTModel], config: TransformerConfig) -> list[Held]:
    """What every pipeline stage holds, in the order of the layers; a collective of the stages."""
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    own = [
        Held(dist.get_rank(group), i, name, get_transformer_layer_offset(config, chunk.vp_stage), shape, weight.dtype)
        for i, chunk in enumerate(chunks)
        for name, weight in named_weights(chunk)
        for shape in [tuple(weight.shape)]
    ]
    stages: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(stages, own, group=group)
    return sorted((held for stage in stages for held in stage), key=lambda held: (held.chunk, held.stage))


def _first_ranks(mesh: Mesh) -> dict[tuple[int, int], int]:
    """`Policy.first_ranks`; a collective of all ranks."""
    places: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(places, (mesh.pipeline_rank, mesh.expert_rank))
    return {place: places.index(place) for place in places}


@torch.no_grad()
def load_weights(policy: Policy, weights: "HFWeights") -> None:
    """Copy each parameter's shard of the Hugging Face tensors in place."""
    mesh = policy.mesh
    for entry, parameter in policy.entries():
        tensors = [
            weights[name] for name in (_TIED_HEAD if policy.tied and entry.hf_names == _HEAD else entry.hf_names)
        ]
        rank, size = mesh.tensor_rank, mesh.tensor_size
        if entry.expert:
            rank, size = mesh.expert_tensor_rank, mesh.expert_tensor_size
        shard = entry.cut.shard(tensors, rank, size, policy.shape)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{', '.join(entry.hf_names)}: this rank's shard has shape {tuple(shard.shape)}, "
                f"the model wants {tuple(parameter.shape)}; config.json and the weights do not belong together"
            )
        parameter.copy_(shard)
        if entry.cut.dim is not None:
            # megatron-core marks what it initialises; unmarked, the gradient norm counts this shard on rank 0 alone
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim, parameter.partition_stride = entry.cut.dim, 1  # type: ignore[attr-defined]


class HFWeights:
    """The tensors of a Hugging Face folder by name, read one at a time from safetensors."""

    def __init__(self, path: Path) -> None:
        index = path / "model.safetensors.index.json"
        single = path / "model.safetensors"
        if index.is_file():
            self._file_of = json.loads(index.read_text())["weight_map"]
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), single.name)
        else:
            raise FileNotFoundError(
                f"{path} holds neither model.safetensors nor model.safetensors.index.json; "
                "model.path must be a Hugging Face folder"
            )
        self._path = path
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise KeyError(f"{self._path}: no tensor {name!r}; the folder is incomplete or of another architecture")
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(self._path / file, framework="pt")
        return self._open[file].get_tensor(name)


@torch.no_grad()
def hf_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Full Hugging Face tensors of the live model, one at a time, on every rank; all ranks iterate in step.

    Where nothing must be gathered they are views of the weights, which the next update changes.
    """
    stages: Any = parallel_state.get_pipeline_model_parallel_group()
    experts: Any = parallel_state.get_expert_model_parallel_group()
    stage = dist.get_rank(stages)
    own = [dict(named_weights(chunk)) for chunk in policy.chunks]
    for held, entries in exported(policy):
        if held.stage == stage:
            local = own[held.chunk][held.name].detach().contiguous()
        else:
            local = torch.empty(held.shape, dtype=held.dtype, device=policy.mesh.device)
        if dist.get_world_size(stages) > 1:
            dist.broadcast(local, dist.get_global_rank(stages, held.stage), group=stages)
        expert, cut = entries[0].expert, entries[0].cut
        group: Any = parallel_state.get_expert_tensor_parallel_group() if expert else tensor_group()
        shards = [local] if cut is names.REPLICATED else all_gather(local, group)
        merged = cut.merge(shards, policy.shape)
        for names_of_rank, tensors in zip(
            (entry.hf_names for entry in entries),
            zip(*(all_gather(t, experts) for t in merged), strict=True) if expert else [merged],
            strict=True,
        ):
            yield from zip(names_of_rank, tensors, strict=True)


def hf_shapes(policy: Policy) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and full shapes of `hf_tensors` in its order, without any communication."""
    mesh = policy.mesh
    for held, entries in exported(policy):
        size = mesh.expert_tensor_size if entries[0].expert else mesh.tensor_size
        merged = entries[0].cut.merge([torch.empty(held.shape, device="meta")] * size, policy.shape)
        for entry in entries:
            for name, tensor in zip(entry.hf_names, merged, strict=True):
                yield name, held.dtype, tuple(tensor.shape)


def exported(policy: Policy) -> Iterator[tuple[Held, list[names.Entry]]]:
    """Every parameter that is in the Hugging Face folder; for an expert the entries of all expert ranks."""
    for held in policy.held:
        entries = [policy.entry(held.name, held.first_layer, rank) for rank in range(policy.mesh.expert_size)]
        if policy.tied and entries[0].hf_names == _HEAD:
            continue  # the last stage's copy of the embedding
        yield held, entries if entries[0].expert else entries[:1]


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The group's tensors, which are alike, in the order of its ranks."""
    size = dist.get_world_size(group)
    if size == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor, group=group)
    return parts


_HEAD = ("lm_head.weight",)
_TIED_HEAD = ("model.embed_tokens.weight",)


def _layer_spec(sizes: Sizes, config: TransformerConfig, layers: str, device: str, chunk: int | None) -> Any:
    """Layers for GPTModel: Transformer Engine's, or megatron-core's local ones with our attention and norm."""
    if layers == "auto":
        layers = "transformer_engine" if device == "cuda" else "local"
    te = layers == "transformer_engine"
    kinds = {experts: _layer(sizes, config, experts, te) for experts in {None, config.num_moe_experts}}
    first = get_transformer_layer_offset(config, chunk)
    specs = [
        kinds[config.num_moe_experts if layer >= sizes.dense_layers else None]
        for layer in range(first, first + get_num_layers_to_build(config, chunk))
    ]
    norm: Any = _te_norm() if te else RMSNorm  # a class, where megatron-core's annotation says module or spec
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _layer(sizes: Sizes, config: TransformerConfig, experts: int | None, te: bool) -> Any:
    """One kind of layer: with experts or with a dense MLP."""
    options: dict[str, Any] = {
        "num_experts": experts,
        "qk_layernorm": bool(config.qk_layernorm),
    }
    if te:
        spec = get_gpt_layer_with_transformer_engine_spec(
            moe_grouped_gemm=config.moe_grouped_gemm and experts is not None, **options
        )
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", **options)
    parts: Any = spec.submodules
    attention = parts.self_attention.submodules
    if "o" in sizes.bias:  # megatron-core's add_bias_linear would give the MLP one too
        attention.linear_proj = partial(_biased, attention.linear_proj)
    if te:
        attention.core_attention = te_attention()
    else:
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        attention.core_attention = PackedAttention
        mlp = parts.mlp.keywords["submodules"]
        for gated in (mlp.experts, mlp.shared_experts) if experts else (parts.mlp,):
            gated.keywords["submodules"].activation_func = SwiGLU
        if sizes.qk_norm == "head":
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if sizes.qk_norm == "projection":
        attention.q_layernorm = partial(ProjectionNorm, heads=sizes.heads)
        attention.k_layernorm = partial(ProjectionNorm, heads=sizes.kv_heads)
    return spec


def _biased(linear: Any, *sizes: int, bias: bool, **options: Any) -> torch.nn.Module:
    return linear(*sizes, bias=True, **options)


def _te_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
