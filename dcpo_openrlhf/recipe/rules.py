"""The rules between fields of a recipe: what no single field can break alone."""

from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from dcpo_openrlhf.recipe.schema import Recipe


def rules(r: "Recipe") -> list[tuple[bool, str]]:
    """(does the rule hold, what to say if not) for each rule between fields."""
    return [
        *_step_rules(r),
        *_data_rules(r),
        *_reward_rules(r),
        *_correction_rules(r),
        *_method_rules(r),
        *_mesh_rules(r),
        *_device_rules(r),
        *_backend_rules(r),
    ]


def _step_rules(r: "Recipe") -> list[tuple[bool, str]]:
    """What a step takes and makes: prompts, responses, micro-batches, evaluation."""
    p, t = r.parallel, r.train
    rows, data = t.prompts_per_update * t.group_size, max(p.data, 1)
    multiple = 2 * p.context if p.context > 1 else 1
    longest = -(-r.rollout.context // multiple) * multiple
    return [
        (
            t.group_size >= 2,
            f"train.group_size = {t.group_size} must be at least 2: the advantage of a group of one is undefined; "
            "raise it (8 in the paper)",
        ),
        (
            t.prompts_per_step % t.prompts_per_update == 0,
            f"train.prompts_per_step = {t.prompts_per_step} must be a multiple of "
            f"train.prompts_per_update = {t.prompts_per_update}; change one of them",
        ),
        (
            rows % data == 0,
            f"train.prompts_per_update * group_size = {t.prompts_per_update} * {t.group_size} = {rows} rows "
            f"must divide evenly over {data} data-parallel ranks; change prompts_per_update or the mesh",
        ),
        (
            r.evaluation.temperature > 0 or r.evaluation.samples == 1,
            f"evaluation.samples = {r.evaluation.samples} at evaluation.temperature = 0 repeat one answer; "
            "use samples = 1 or a temperature above 0",
        ),
        (
            r.rollout.temperature == 1 or t.rollout_only or r.correction.level != "off",
            f"rollout.temperature = {r.rollout.temperature} must be 1 to train: rho, the policy ratio and the "
            "entropy are those of the policy at T = 1, and samples of another T are not drawn from it; set 1, "
            "correction.level=token, which weighs them, or train.rollout_only=true to generate alone",
        ),
        (
            r.rollout.replay is None or not (t.rollout_only or r.rollout.record),
            "rollout.replay reads recorded responses: train.rollout_only and rollout.record have no use; unset them",
        ),
        (
            not t.rollout_only or r.checkpoint.resume == "never",
            "train.rollout_only has nothing to resume: its policy is the model; set checkpoint.resume=never",
        ),
        (
            max(r.run.profile, default=0) <= t.steps,
            f"run.profile = {r.run.profile} must name steps up to train.steps = {t.steps}; correct it, or raise that",
        ),
        (
            not (t.rollout_only and r.run.profile),
            f"run.profile = {r.run.profile} traces training steps, of which train.rollout_only has none; unset one",
        ),
        (
            t.micro_batch_tokens is None or t.micro_batch_tokens >= longest,
            f"train.micro_batch_tokens = {t.micro_batch_tokens} must hold the longest response: "
            f"rollout.max_prompt_tokens + max_new_tokens = {r.rollout.context}"
            + (f", filled up to {longest} for parallel.context = {p.context}" if p.context > 1 else "")
            + "; raise it",
        ),
        (
            r.optimizer.schedule != "constant" or r.optimizer.min_learning_rate == 0,
            f"optimizer.min_learning_rate = {r.optimizer.min_learning_rate} has no effect with schedule = constant; "
            "use linear or cosine, or leave it at 0",
        ),
    ]


def _data_rules(r: "Recipe") -> list[tuple[bool, str]]:
    """Files of problems and their weights."""
    train, heldout = ([file.weight for file in r.task.files(key)] for key in ("train", "heldout"))
    return [
        (
            r.task.kind != "jsonl" or r.task.train is not None,
            "task.kind = jsonl needs task.train, a file of problems; name one or set task.kind=arithmetic",
        ),
        (
            None not in train or train.count(None) == len(train),
            f"task.train has weights for {len(train) - train.count(None)} of its {len(train)} files; name one for each "
            "(its share of the prompts), or none (every problem once an epoch)",
        ),
        (
            heldout.count(None) == len(heldout),
            "task.heldout takes no weights: every problem is evaluated; drop them",
        ),
    ]


def _correction_rules(r: "Recipe") -> list[tuple[bool, str]]:
    c, off = r.correction, r.correction.level == "off"
    return [
        (
            off or c.low < c.high,
            f"correction.low = {c.low:g} must be below correction.high = {c.high:g}; change one of them",
        ),
        (
            off or c.gating != "ratio" or c.low >= c.high or c.low <= 1 <= c.high,
            f"correction.low = {c.low:g} and correction.high = {c.high:g} must hold 1 between them, pi_old / mu of a "
            "token that both give the same probability, or all that is drawn on-policy is outside; change one of them",
        ),
        (
            off or c.gating != "tv" or c.low > 0 or c.high < 1,
            f"correction.high = {c.high:g} must be below 1 with correction.gating = tv: |mu - pi_old| is never more, "
            "and nothing would be outside; lower it",
        ),
        (
            off or c.mode == "mask" or (c.level == "token" and c.gating == "ratio"),
            f"correction.mode = clip clamps the ratio of a token, not correction.level = {c.level} with "
            f"correction.gating = {c.gating}; use mode=mask, or level=token and gating=ratio",
        ),
        (
            off or c.gating == "ratio" or c.low == 0,
            f"correction.gating = {c.gating} is bounded above alone, got correction.low = {c.low:g}; set low=0 and "
            "high to the largest divergence",
        ),
    ]


def _reward_rules(r: "Recipe") -> list[tuple[bool, str]]:
    """Names of graders; the buffer of the overlong penalty."""
    built_in = get_args(type(r.reward).model_fields["extractor"].annotation)
    function, by_source = r.reward.function, r.reward.by_source
    wrong = {source: name for source, name in by_source.items() if name not in built_in and not _names_function(name)}
    return [
        (
            function is None or _names_function(function),
            f"reward.function = {function!r} must be FILE.py:NAME or import.path:NAME; correct it, or set "
            "reward.extractor for a built-in grader",
        ),
        (
            not wrong,
            f"reward.by_source = {wrong} must give each source FILE.py:NAME, import.path:NAME or one of "
            f"{', '.join(built_in)}; correct the names",
        ),
        (
            (r.reward.overlong_buffer_len or 0) <= r.rollout.max_new_tokens,
            f"reward.overlong_buffer_len = {r.reward.overlong_buffer_len} must be at most rollout.max_new_tokens = "
            f"{r.rollout.max_new_tokens}, where the penalty is whole; lower it",
        ),
    ]


def _method_rules(r: "Recipe") -> list[tuple[bool, str]]:
    """The course of H_0, and bounds that must be in order."""
    m = r.method
    return [
        (
            (m.target_schedule == "constant") == (m.target_entropy_end is None),
            f"method.target_schedule = {m.target_schedule} with method.target_entropy_end = {m.target_entropy_end}: "
            "linear and cosine need the H_0 of the last step, constant has none; set both or neither",
        ),
        (
            m.clip_cov_low < m.clip_cov_high,
            f"method.clip_cov_low = {m.clip_cov_low} must be below method.clip_cov_high = {m.clip_cov_high}; "
            "change one of them",
        ),
    ]


def _names_function(name: str) -> bool:
    place, colon, function = name.rpartition(":")
    return bool(colon and place and function.isidentifier())


def _mesh_rules(r: "Recipe") -> list[tuple[bool, str]]:
    """Ranks, and the devices that engines share with them."""
    p = r.parallel
    split = p.tensor * p.pipeline * p.context
    return [
        (
            p.world_size % split == 0,
            f"parallel.tensor * pipeline * context = {p.tensor} * {p.pipeline} * {p.context} = {split} must divide "
            f"nodes * devices_per_node = {p.nodes} * {p.devices_per_node} = {p.world_size}; lower one of them",
        ),
        (
            p.expert == 1 or p.world_size % (p.expert * p.pipeline) == 0,
            f"parallel.expert * pipeline = {p.expert} * {p.pipeline} must divide nodes * devices_per_node = "
            f"{p.nodes} * {p.devices_per_node} = {p.world_size}; lower one of them",
        ),
        (
            p.virtual_pipeline == 1 or p.pipeline > 1,
            f"parallel.virtual_pipeline = {p.virtual_pipeline} needs parallel.pipeline > 1, got {p.pipeline}; "
            "raise pipeline or leave it at 1",
        ),
        (
            not p.sequence_parallel or p.tensor > 1,
            f"parallel.sequence_parallel needs parallel.tensor > 1, got {p.tensor}; turn it off or raise tensor",
        ),
        (
            not p.colocate or r.rollout.engines * r.rollout.tensor_parallel <= p.world_size,
            f"parallel.colocate puts rollout.engines * tensor_parallel = {r.rollout.engines} * "
            f"{r.rollout.tensor_parallel} on {p.world_size} training devices; lower one of them",
        ),
        (
            not p.colocate or (r.generates and not r.train.rollout_only),
            "parallel.colocate needs both training and engines; unset it, rollout.replay or train.rollout_only",
        ),
        (
            not (r.rollout.ahead and p.colocate),
            f"rollout.ahead = {r.rollout.ahead} draws responses while the policy trains, and with parallel.colocate "
            "the engines are asleep then: they share its devices; set ahead=0, or colocate=false and give them devices",
        ),
        (
            not (r.rollout.ahead and r.train.rollout_only),
            f"rollout.ahead = {r.rollout.ahead} draws responses while the policy trains, and with train.rollout_only "
            "none does; set ahead=0",
        ),
    ]


def _device_rules(r: "Recipe") -> list[tuple[bool, str]]:
    """What needs cuda, or one node."""
    p = r.parallel
    return [
        (
            r.optimizer.cpu_offload == 0 or r.run.device == "cuda",
            f"optimizer.cpu_offload = {r.optimizer.cpu_offload} needs run.device = cuda: on cpu it is all "
            "in host memory already; set 0",
        ),
        (
            r.run.device == "cpu" or r.transport in ("nccl", "ipc"),
            f"weight_sync.transport = {r.transport} is for run.device = cpu; use nccl or ipc on cuda",
        ),
        (
            r.run.device == "cuda" or r.transport in ("gloo", "shared_memory"),
            f"weight_sync.transport = {r.transport} needs run.device = cuda; use gloo or shared_memory on cpu",
        ),
        (
            r.transport != "ipc" or p.colocate,
            "weight_sync.transport = ipc hands tensors over within a device, and without parallel.colocate the engines "
            "have devices of their own; use nccl, or set colocate",
        ),
        (
            r.transport != "nccl" or not p.colocate,
            "weight_sync.transport = nccl joins processes on devices of their own, and with parallel.colocate a policy "
            "rank and an engine share one; use ipc, or unset colocate",
        ),
        (
            r.transport != "shared_memory" or p.nodes == 1,
            f"weight_sync.transport = shared_memory needs one node, got parallel.nodes = {p.nodes}; use gloo",
        ),
    ]


def _backend_rules(r: "Recipe") -> list[tuple[bool, str]]:
    """The same for parallel.backend: what only one of the two trainers can do."""
    p, megatron = r.parallel, r.parallel.backend == "megatron"
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "sequence_parallel")
    split = {name: getattr(p, name) for name in names if getattr(p, name) != type(p).model_fields[name].default}
    return [
        (
            not megatron or p.zero_stage == 2,
            f"parallel.zero_stage = {p.zero_stage} needs parallel.backend = deepspeed, got megatron; "
            "leave it at 2 or change the backend",
        ),
        (
            megatron or not split,
            "parallel.backend = deepspeed shards over the data ranks alone, got "
            + ", ".join(f"parallel.{name} = {value}" for name, value in split.items())
            + "; leave these at their defaults, or set backend = megatron",
        ),
        (
            megatron or r.model.layers == "auto",
            f"model.layers = {r.model.layers} is for parallel.backend = megatron: deepspeed trains transformers' own "
            "layers; leave it at auto",
        ),
        (
            megatron or r.train.recompute != "selective",
            "train.recompute = selective is for parallel.backend = megatron; use none or full with deepspeed",
        ),
        (
            megatron or r.optimizer.cpu_offload == 0,
            f"optimizer.cpu_offload = {r.optimizer.cpu_offload} is for parallel.backend = megatron: DeepSpeed's own "
            "needs a compiled optimizer; set 0, and zero_stage = 3 to save memory",
        ),
        (
            megatron or not p.colocate or p.zero_stage == 2,
            "parallel.colocate with parallel.zero_stage = 3: DeepSpeed moves that stage's optimizer to host memory "
            "only where it is its compiled one; use zero_stage = 2",
        ),
    ]
