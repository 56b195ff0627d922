"""What a run takes: memory of every training device and engine, disk, and a rough time a step. Numbers in, numbers out.

From config.json and the recipe alone, before anything is started. Activations are counted as in Korthikanti et al. 2022
(arXiv 2205.05198, Sec. 4): the tensors that each layer keeps for its backward pass.
"""

from collections.abc import Iterator
from typing import NamedTuple

from dcpo_openrlhf.recipe.families import Sizes, dense_part
from dcpo_openrlhf.recipe.schema import Recipe

GIB = 2**30
RESERVE = {"cuda": 2 * GIB, "cpu": 0}
"""Assumed for what no tensor of ours holds: CUDA context, nccl's buffers, the allocator's gaps [bytes]."""
STATS_BUFFERS = {"cuda": 2 * 2**26 * 4, "cpu": 2 * 2**18 * 4}
"""Two fp32 blocks of policy/token_stats.py [bytes]; on cpu for each thread, of which one is counted."""
ZERO_BUCKET = 5 * 10**8
"""DeepSpeed's reduce_bucket_size: gradients that wait for their reduction [parameters]."""
ZERO_LIVE = 10**9
"""DeepSpeed's stage3_max_live_parameters: weights of stage 3 that a rank holds whole [parameters]."""
SHORT_ATTENTION = 512
"""On cpu, segments up to this length [tokens] are attended to by plain multiplies, which keep the softmax's weights:
torch's fused kernel is slower there, 3.5 x in bf16 at 50 tokens (megatron/fused.py)."""
SHARED_BLOCK = 256
"""On cpu, responses to one prompt are attended to together in blocks of about this many tokens, prompt included."""
BYTES = {"bf16": 2, "fp32": 4, "bfloat16": 2, "float32": 4}


class TrainerMemory(NamedTuple):
    """Bytes on one training device while gradients are computed; the fields add up to its peak."""

    weights: float
    gradients: float
    """fp32, main gradients of megatron-core's DDP; ZeRO: this rank's share, and those that wait for their reduction."""
    optimizer: float
    """fp32 main weights (bf16 models, and ZeRO) and Adam's two moments, over the data ranks; less what is offloaded."""
    activations: float
    logits: float
    """Of the action positions; their gradient takes their place."""
    workspace: float
    """The output layer's weight gradient before it is added, blocks of the token statistics, and the reserve."""

    @property
    def total(self) -> float:
        return sum(self)


def trainer_memory(s: Sizes, recipe: Recipe) -> TrainerMemory:
    """That of the pipeline stage that takes the most."""
    return max((stage_memory(s, recipe, stage) for stage in range(recipe.parallel.pipeline)), key=lambda m: m.total)


def stage_memory(s: Sizes, recipe: Recipe, stage: int) -> TrainerMemory:
    """Bytes on each device of one pipeline stage (0 is the first)."""
    p, element = recipe.parallel, BYTES[recipe.model.dtype]
    if p.backend == "deepspeed":
        return _zero_memory(s, recipe)
    layers, first, last = _layers_of(s, recipe, stage), stage == 0, stage == p.pipeline - 1
    table = _vocabulary_rows(s, recipe) // p.tensor * s.hidden
    tables = first + last if not s.tied or p.pipeline > 1 else 1
    dense = dense_part(s, p.tensor, layers) + tables * table + s.hidden * last
    mixtures = len(range(max(layers.start, s.dense_layers), layers.stop)) / max(s.layers - s.dense_layers, 1)
    experts = s.expert_parameters * mixtures / p.expert / p.expert_tensor
    dense_ranks = p.data * p.context
    expert_ranks = p.world_size / (p.expert * p.expert_tensor * p.pipeline)
    state = 12 if recipe.model.dtype == "bf16" else 8
    tokens = micro_batch_tokens(recipe) / p.context
    logits = min(tokens, action_positions(recipe) / p.context) if last else 0
    held = 2 if recipe.kl.coefficient and recipe.run.device == "cpu" else 1  # the starting model, in host memory
    workspace = (table * element + STATS_BUFFERS[recipe.run.device]) * last + RESERVE[recipe.run.device]
    return TrainerMemory(
        weights=held * element * (dense + experts),
        gradients=4 * (dense + experts),
        optimizer=(1 - recipe.optimizer.cpu_offload) * state * (dense / dense_ranks + experts / expert_ranks),
        activations=tokens * activation_bytes(s, recipe, stage),
        logits=logits * element * _vocabulary_rows(s, recipe) / p.tensor,
        workspace=workspace,
    )


def _layers_of(s: Sizes, recipe: Recipe, stage: int) -> range:
    """Of one pipeline stage; interleaved ones are counted as if they stood together."""
    each = s.layers // recipe.parallel.pipeline
    return range(stage * each, (stage + 1) * each)


def _zero_memory(s: Sizes, recipe: Recipe) -> TrainerMemory:
    """Bytes on each device with ZeRO: stage 2 shares out gradients and optimizer over the ranks, 3 the weights too.

    Gradients that wait and activations are added up, though the former grow while the latter shrink: on the safe side.
    """
    p, element = recipe.parallel, BYTES[recipe.model.dtype]
    share = s.parameters / p.world_size
    tokens = micro_batch_tokens(recipe)
    live = s.parameters if p.zero_stage == 2 else share + min(s.parameters, ZERO_LIVE)
    table = s.vocab * s.hidden
    return TrainerMemory(
        weights=element * live,
        # in DeepSpeed's buffer, and bf16 in fp32 too while they are reduced
        gradients=4 * share + (element + 4 * (element == 2)) * min(s.parameters, ZERO_BUCKET),
        optimizer=12 * share,
        activations=tokens * activation_bytes(s, recipe, 0),
        logits=min(tokens, action_positions(recipe)) * element * s.vocab,
        workspace=table * element + STATS_BUFFERS[recipe.run.device] + RESERVE[recipe.run.device],
    )


def _vocabulary_rows(s: Sizes, recipe: Recipe) -> int:
    unit = recipe.model.vocab_multiple * recipe.parallel.tensor
    return -(-s.vocab // unit) * unit


def micro_batch_tokens(recipe: Recipe) -> int:
    """Most tokens of one micro-batch of one data rank."""
    r, t = recipe.rollout, recipe.train
    if t.micro_batch_tokens:
        return t.micro_batch_tokens
    prompts = max(t.micro_batch_size // t.group_size, 1) if recipe.shares_prompts else t.micro_batch_size
    return prompts * r.max_prompt_tokens + t.micro_batch_size * r.max_new_tokens


def action_positions(recipe: Recipe) -> int:
    """Most response tokens of one micro-batch: all of a packed one, were its prompts short."""
    if recipe.train.micro_batch_tokens:
        return recipe.train.micro_batch_tokens
    return recipe.train.micro_batch_size * recipe.rollout.max_new_tokens


def activation_bytes(s: Sizes, recipe: Recipe, stage: int) -> float:
    """Kept for the backward pass per token of a micro-batch: layers, stages ahead of the last one, recomputation."""
    p, train = recipe.parallel, recipe.train
    layers = s.layers / p.pipeline
    in_flight = p.pipeline - stage  # 1F1B: micro-batches under way on this stage
    if p.virtual_pipeline > 1:  # Korthikanti et al., Sec. 4.2.3
        in_flight = p.pipeline * (1 + (p.pipeline - 1) / (p.pipeline * p.virtual_pipeline))
    sequence = p.tensor if p.sequence_parallel else 1
    whole_layer = layer_activation_bytes(s, recipe)
    if train.recompute == "full":  # each layer's input; one layer at a time is made again, and its gradients
        return in_flight * layers * BYTES[recipe.model.dtype] * s.hidden / sequence + 2 * whole_layer
    return in_flight * layers * whole_layer  # selective makes the attention's core again


def layer_activation_bytes(s: Sizes, recipe: Recipe) -> float:
    """Kept by one layer per token. Residual stream, norms and linear inputs are whole on every tensor rank without
    sequence parallelism; heads and MLP columns are shared out.
    """
    p, e = recipe.parallel, BYTES[recipe.model.dtype]
    sequence = p.tensor if p.sequence_parallel else 1
    hf = p.backend == "deepspeed"
    cpu = not hf and recipe.run.device == "cpu"  # megatron/fused.py
    local = hf or recipe.model.layers == "local" or cpu
    # local: fp32 input and normalised input of torch's rms_norm; fused: the input alone
    norm = 8 if local and not cpu else e
    # q, k, v and out; local gathers out anew
    attention = e * (2 * s.query + 2 * s.key * _keys_per_token(recipe)) + (e * s.query if local else 0)
    attention += (s.query + s.key) * norm * (s.qk_norm in ("head", "projection"))
    attention += 0 if cpu else 4 * e * s.head_dim  # rotary: cos and sin for q and k; on cpu all layers share them
    columns = (4 if hf else 3) * e * s.ffn  # gate and up, and their product; where SwiGLU is not fused silu(gate) too
    if _short(recipe) and recipe.train.recompute != "selective":
        seen = max(recipe.rollout.context, SHARED_BLOCK) if recipe.shares_prompts else recipe.rollout.context
        attention += s.heads * seen * e  # softmax's weights
    hidden = 2 * norm * s.hidden + 2 * e * s.hidden  # two norms, inputs of qkv and of the first MLP layer
    if s.experts:
        # tokens sent to experts and back, over as many ranks as send here: balanced routing is assumed
        shared = columns / max(s.ffn, 1) * s.shared_ffn
        columns = shared + s.experts_per_token * (columns / p.expert_tensor + 2 * e * s.hidden) * p.tensor / sequence
    return hidden / sequence + (attention + columns) / p.tensor


def _short(recipe: Recipe) -> bool:
    on_cpu = recipe.run.device == "cpu" and recipe.parallel.backend == "megatron"
    return on_cpu and recipe.rollout.context <= SHORT_ATTENTION


def _keys_per_token(recipe: Recipe) -> float:
    """Keys that attention keeps for each token at full lengths: a shared prompt's for every block or response."""
    if not recipe.shares_prompts:
        return 1.0
    prompt, response, group = recipe.rollout.max_prompt_tokens, recipe.rollout.max_new_tokens, recipe.train.group_size
    together = max((SHARED_BLOCK - prompt) // response, 1) if _short(recipe) else 1
    copies = -(-group // together) + (not _short(recipe))
    return (copies * prompt + group * response) / (prompt + group * response)


class EngineMemory(NamedTuple):
    """Bytes on one device of a rollout engine."""

    weights: float
    kv_cache: float
    """What vLLM leaves for it: gpu_memory_utilization of the device less weights and reserve; on cpu, as set."""
    kv_tokens: int
    """Tokens that the engine's cache holds."""


def engine_memory(s: Sizes, recipe: Recipe) -> EngineMemory:
    r, e = recipe.rollout, BYTES[recipe.engine_dtype]
    tensor = r.tensor_parallel
    copied_kv = max(tensor // s.kv_heads, 1)  # a rank holds at least one key/value head
    weights = e * s.parameters / tensor
    if recipe.run.device == "cpu":
        kv_cache = r.cpu_kv_cache_gb * GIB / tensor
    else:
        kv_cache = r.gpu_memory_utilization * recipe.parallel.device_memory_gb * GIB - weights - RESERVE["cuda"]
    token = 2 * s.layers * s.key * copied_kv / tensor * e
    return EngineMemory(weights, kv_cache, int(kv_cache // token))


def checkpoint_bytes(s: Sizes, recipe: Recipe) -> int:
    """One checkpoint: weights, fp32 main weights and Adam's two moments of every parameter.

    ZeRO has main weights in fp32 too; its stage 3 saves no others.
    """
    zero = recipe.parallel.zero_stage if recipe.parallel.backend == "deepspeed" else None
    state = 12 if zero or recipe.model.dtype == "bf16" else 8
    return s.parameters * (state + (BYTES[recipe.model.dtype] if zero != 3 else 0))


def disk_bytes(s: Sizes, recipe: Recipe) -> int:
    """Most that checkpoints and export take at once: those kept, the one being written, the Hugging Face folder."""
    c = recipe.checkpoint
    made = recipe.train.steps // c.every + 1 if c.every else 0
    export = s.parameters * BYTES[recipe.model.dtype] if c.export_hf else 0
    return min(made, c.keep_last + c.keep_best + 1) * checkpoint_bytes(s, recipe) + export


class StepTime(NamedTuple):
    """Seconds of one step, an estimate from the recipe's section `estimate`."""

    rollout: float
    token_stats: float
    train: float


def step_time(s: Sizes, recipe: Recipe) -> StepTime:
    """Rollout: response tokens / tokens per second of all engine devices. Training: 6 (and 2 for the statistics'
    forward) FLOPs per active parameter and token, plus causal attention, at the assumed MFU; recomputation counts as
    the time of one more forward."""
    e, p, r = recipe.estimate, recipe.parallel, recipe.rollout
    responses = recipe.train.prompts_per_step * recipe.train.group_size
    answer = min(e.response_tokens, r.max_new_tokens)
    length = answer + min(e.prompt_tokens, r.max_prompt_tokens)
    forward = responses * length * (2 * s.active_parameters + 2 * s.layers * s.query * length)
    seconds = forward / (p.world_size * e.device_tflops * 1e12 * e.mfu)
    passes = 4 if recipe.train.recompute == "full" else 3
    engines = r.engines * r.tensor_parallel
    return StepTime(responses * answer / (engines * e.engine_tokens_per_second), seconds, passes * seconds)


def violations(s: Sizes, recipe: Recipe) -> Iterator[str]:
    """What does not fit into parallel.device_memory_gb; nothing on cpu, where processes share the machine's memory."""
    if recipe.run.device == "cpu":
        return
    limit = recipe.parallel.device_memory_gb
    if not recipe.train.rollout_only and (need := trainer_memory(s, recipe)).total > limit * GIB:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in zip(need._fields, need, strict=True))
        yield (
            f"a training device needs about {need.total / GIB:.1f} GiB ({parts}), parallel.device_memory_gb = "
            f"{limit:g}; {_more_room(recipe)}, set train.recompute=full, or lower train.micro_batch_tokens"
        )
    if recipe.generates and (engine := engine_memory(s, recipe)).kv_tokens < recipe.rollout.context:
        yield (
            f"an engine device holds {engine.weights / GIB:.1f} GiB of weights, which leaves room for "
            f"{max(engine.kv_tokens, 0)} tokens in {recipe.rollout.gpu_memory_utilization:g} of "
            f"parallel.device_memory_gb = {limit:g}; a response takes up to {recipe.rollout.context}; "
            "raise rollout.tensor_parallel or gpu_memory_utilization"
        )


def _more_room(recipe: Recipe) -> str:
    if recipe.parallel.backend == "megatron":
        return "raise parallel.tensor, pipeline or the devices"
    return "raise the devices" + (", set parallel.zero_stage=3" if recipe.parallel.zero_stage == 2 else "")


def _training_plan(s: Sizes, recipe: Recipe) -> str:
    p = recipe.parallel
    devices = f"training: {p.nodes} x {p.devices_per_node} devices"
    if p.backend == "deepspeed":
        return f"{devices}, DeepSpeed ZeRO stage {p.zero_stage} over all of them"
    mesh = f"{devices} = tensor {p.tensor} x pipeline {p.pipeline} x context {p.context} x data {p.data}"
    return mesh + (f"; experts over {p.expert}" if s.experts else "")


def _prompts_plan(recipe: Recipe) -> str:
    if recipe.shares_prompts:
        return "prompts: each computed once for all responses to it in a micro-batch"
    why = "train.share_prompts = false"
    if recipe.train.share_prompts:
        p = recipe.parallel
        why = f"parallel.context = {p.context}" if p.context > 1 else f"parallel.backend = {p.backend}"
    return f"prompts: computed again with every response ({why})"


def _reference_plan(s: Sizes, recipe: Recipe) -> Iterator[str]:
    if recipe.kl.coefficient:
        copies = recipe.parallel.world_size if recipe.parallel.zero_stage == 2 else 1
        if recipe.parallel.backend == "megatron":
            copies = recipe.parallel.data * recipe.parallel.context
        size = copies * s.parameters * BYTES[recipe.model.dtype] / GIB / recipe.parallel.nodes
        yield f"starting model (kl.coefficient = {recipe.kl.coefficient:g}): {size:.2f} GiB of each node's host memory"


def report(s: Sizes, recipe: Recipe) -> str:
    """Plan and memory as text of some twenty lines."""
    p, r, t, e = recipe.parallel, recipe.rollout, recipe.train, recipe.estimate
    limit = "" if recipe.run.device == "cpu" else f" of {p.device_memory_gb:g} GiB"
    lines = [
        f"model: {s.parameters / 1e9:.2f} B parameters"
        + (f", {s.active_parameters / 1e9:.2f} B active a token" if s.experts else ""),
        f"step: {t.prompts_per_step} prompts x {t.group_size} responses, {recipe.updates_per_step} updates; "
        f"up to {r.max_prompt_tokens} + {r.max_new_tokens} tokens each"
        + ("" if t.filter == "none" else f"; {t.filter} filtered, up to {t.filter_rounds} times as many prompts drawn"),
    ]
    if not t.rollout_only:
        lines += [
            _training_plan(s, recipe),
            _prompts_plan(recipe),
            *_reference_plan(s, recipe),
            f"GiB per training device (estimate; {micro_batch_tokens(recipe)} tokens a micro-batch, recompute "
            f"{t.recompute}):",
            f"  {'stage':>6}" + "".join(f"{name:>13}" for name in (*TrainerMemory._fields, "total")),
        ]
        for stage in range(p.pipeline):
            need = stage_memory(s, recipe, stage)
            lines.append(f"  {stage:>6}" + "".join(f"{size / GIB:>13.2f}" for size in (*need, need.total)) + limit)
    if recipe.generates:
        engine = engine_memory(s, recipe)
        lines += [
            f"engines: {r.engines} x tensor parallel {r.tensor_parallel}",
            f"GiB per engine device (estimate): weights {engine.weights / GIB:.2f}, KV cache "
            f"{engine.kv_cache / GIB:.2f} = {engine.kv_tokens} tokens = {engine.kv_tokens / r.context:.1f} responses "
            "of full length" + limit,
        ]
    lines.append(
        f"GiB on disk (estimate): a checkpoint {checkpoint_bytes(s, recipe) / GIB:.1f}, "
        f"run.dir at most {disk_bytes(s, recipe) / GIB:.1f}"
    )
    if recipe.run.device == "cuda":
        seconds = step_time(s, recipe)
        lines.append(
            f"seconds a step (ESTIMATE from estimate.*, not measured: {e.response_tokens} tokens a response, "
            f"{e.engine_tokens_per_second:g} tokens/s an engine device, {e.device_tflops:g} TFLOPS, MFU {e.mfu:g}): "
            + ", ".join(f"{name} {value:.0f}" for name, value in zip(seconds._fields, seconds, strict=True))
            + ("; the rollout beside the other two (rollout.ahead)" if r.ahead else "")
        )
    return "\n".join(lines)
