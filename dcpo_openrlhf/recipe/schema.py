"""The recipe: every setting of a run, its type, its default and its rule. Nothing else in the package has defaults."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from dcpo_openrlhf.recipe.fields import Expanded, Fraction, Port, Positive, Section
from dcpo_openrlhf.recipe.method import Method
from dcpo_openrlhf.recipe.monitor import Action as Action
from dcpo_openrlhf.recipe.monitor import Monitor
from dcpo_openrlhf.recipe.processor import native_dtype
from dcpo_openrlhf.recipe.reward import Reward
from dcpo_openrlhf.recipe.rules import rules
from dcpo_openrlhf.recipe.task import DataFile as DataFile
from dcpo_openrlhf.recipe.task import Fields as Fields
from dcpo_openrlhf.recipe.task import Task


class RecipeError(ValueError):
    """A recipe that cannot be run: names the rule, the values seen and the remedy."""


class Run(Section):
    dir: Expanded = Path("runs/dcpo")
    """Run folder: resolved recipe, metrics, checkpoints, samples, report."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Seed of prompts, engine sampling and weight initialisation."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cuda: nccl and GPUs. cpu: gloo and Ray's logical devices; the same code."""
    ray_address: str | None = None
    """None: join the job's cluster if one is announced (RAY_ADDRESS), else start a local one."""
    logical_devices: Positive = 8
    """Devices of the local cluster that a run on cpu starts by itself."""
    profile: list[Positive] = []  # noqa: RUF012  (pydantic copies it)
    """Steps of which torch's profiler writes traces to profile/: driver, one policy rank a pipeline stage."""
    worker_logs: bool = False
    """Show the output of actors and engines in the driver's log too; it is in Ray's session folder either way."""
    startup_timeout: Annotated[float, Field(gt=0)] = 900.0
    """Seconds until engines and actors must be ready."""
    shutdown_timeout: Annotated[float, Field(gt=0)] = 8.0
    """Seconds that actors and engines are given to end after a signal; they are killed then."""


class Model(Section):
    path: Expanded
    """Hugging Face model folder (config.json, safetensors, tokenizer)."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Working weights. bf16 keeps fp32 main weights in the optimizer. auto: bf16 on cuda and on a CPU that multiplies
    it natively (AVX512-BF16, AMX), else fp32; a resumed run keeps its checkpoint's."""
    layers: Literal["auto", "transformer_engine", "local"] = "auto"
    """Layer implementation of megatron; auto: Transformer Engine on cuda, where it must be installed, local on cpu."""
    vocab_multiple: Positive = 128
    """The vocabulary is padded to a multiple of this times the tensor parallel size; padded rows are masked."""
    trust_remote_code: bool = False
    config: Expanded | None = None
    """config.json that --dry-run plans with while `path` does not hold the model yet; a run never reads it."""


class Loss(Section):
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The ratio counts no less than 1 - clip_low; at 1 nothing is clipped below."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Lower bound factor for negative advantages (3.0 in the authors' code); None: off, as in the paper."""
    aggregation: Literal["sequence_mean", "token_mean"] = "sequence_mean"


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class Correction(Section):
    level: Annotated[Literal["off", "token", "sequence"], BeforeValidator(_off)] = "off"
    """Weight every token by pi_old / mu, mu the engine's own probability of it; what the gate reads: a token, or the
    mean over its response. off: none, as in the paper (OpenRLHF's is_correction_level)."""
    mode: Literal["mask", "clip"] = "mask"
    """Outside [low, high]: no weight at all, or (token and ratio alone) the bound as weight."""
    gating: Literal["ratio", "binary_kl", "tv"] = "ratio"
    """What the gate reads: pi_old / mu, or the divergence of the two at the sampled token, bounded above alone."""
    low: Annotated[float, Field(ge=0)] = 0.5
    high: Annotated[float, Field(gt=0)] = 5.0


class KL(Section):
    coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of KL(pi_theta || starting model); 0: none, and no copy of the starting weights (algo.kl.init_coef)."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of a sampled token, with d = log pi_theta - log pi_ref: k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d."""
    use_loss: bool = True
    """In the loss. false: its sum over a response, by pi_old, is taken off the response's reward."""
    unbiased_gradient: bool = False
    """In the loss: the divergence's own gradient for every estimator. Else its formula's; k1's is 0 on average."""


class Optimizer(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine end at min_learning_rate at the last update."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """As in the authors' code."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Bound of the global gradient norm."""
    cpu_offload: Fraction = 0.0
    """Share of the optimizer's state that is kept and stepped in host memory, cuda only (megatron-core's offload)."""


GroupFilter = Literal["none", "all_wrong", "uniform"]


class Train(Section):
    steps: Positive = 100
    """Rollout steps."""
    prompts_per_step: Positive = 512
    prompts_per_update: Positive = 128
    """Prompts of one optimizer step; prompts_per_step / prompts_per_update updates a step."""
    group_size: Annotated[int, Field(ge=1)] = 8
    """G, responses per prompt."""
    filter: GroupFilter = "none"
    """Groups that are not trained on: all_wrong: those without a success; uniform: also those of successes alone
    (DAPO's dynamic sampling), which dcpo's R forbids. Further prompts take their place; metrics are of all drawn."""
    filter_rounds: Positive = 4
    """Times that a step's engines are asked for groups, at most, until train.filter has kept prompts_per_step. What is
    missing then is filled up with dropped groups, at an advantage of 0."""
    micro_batch_size: Positive = 8
    """Rows of one forward/backward on one data-parallel rank; not used where micro_batch_tokens is set."""
    micro_batch_tokens: Positive | None = None
    """Tokens of one forward/backward on one data-parallel rank: rows are packed up to that many, without padding."""
    share_prompts: bool = True
    """Compute each prompt once for all responses to it in a micro-batch; Megatron without context parallelism alone."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation; selective (the attention's core) is megatron-core's alone."""
    rollout_only: bool = False
    """Generate and grade the steps' responses with the model as it is; no policy is started, nothing is trained."""


class Parallel(Section):
    backend: Literal["megatron", "deepspeed"] = "megatron"
    """Who trains: megatron-core, or OpenRLHF's DeepSpeed ZeRO, which shards over the data ranks alone."""
    zero_stage: Literal[2, 3] = 2
    """deepspeed: 2 shards optimizer state and gradients over the devices, 3 the weights too."""
    nodes: Positive = 1
    devices_per_node: Positive = 8
    """Training devices on each node (logical ones on cpu)."""
    tensor: Positive = 1
    pipeline: Positive = 1
    virtual_pipeline: Positive = 1
    """Model chunks on each pipeline stage; above 1: megatron-core's interleaved schedule."""
    context: Positive = 1
    """Ranks that share each sequence; every response is padded to a multiple of twice this."""
    expert: Positive = 1
    """Ranks that share the experts of a layer; taken from the tensor, context and data ranks."""
    sequence_parallel: bool = False
    """Split activations along the sequence over the tensor ranks between the matrix multiplies."""
    colocate: bool = False
    """Engines share the training devices: either side is asleep, in host memory, while the other one works."""
    cpu_threads: Positive | None = None
    """Threads of one policy rank on cpu; None: all cores divided by the ranks of a node. With rollout.ahead engines
    compute at the same time: leave them cores (rollout.cpu_threads)."""
    device_memory_gb: Annotated[float, Field(gt=0)] = 80.0
    """Memory of one training or engine device [GiB], which the estimate must fit into; without effect on cpu."""

    @property
    def expert_tensor(self) -> int:
        """Parts that an expert is cut into: as the dense layers, or one where the experts themselves are shared out."""
        return self.tensor if self.expert == 1 else 1

    def threads(self, cores: int) -> int:
        """Of one policy rank on cpu."""
        return self.cpu_threads or max(cores // self.devices_per_node, 1)

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def data(self) -> int:
        """Data-parallel size: devices / (tensor * pipeline * context)."""
        return self.world_size // (self.tensor * self.pipeline * self.context)


class Rollout(Section):
    engines: Positive = 8
    tensor_parallel: Positive = 1
    max_prompt_tokens: Positive = 2048
    max_new_tokens: Positive = 8192
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """1 to train: what is drawn at another T is not drawn from pi_old. Any for train.rollout_only."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Below 1 the sampler is no longer pi_old and E[rho] != 1."""
    stop: list[str] = []  # noqa: RUF012
    """Texts, each one token, that end a response, beside EOS and the end of turn of the chat template."""
    dtype: Literal["bfloat16", "float32", "auto"] = "auto"
    """Engine weights; auto follows model.dtype."""
    gpu_memory_utilization: Fraction = 0.85
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    """Skip graph capture; always on on cpu."""
    max_sequences: Positive | None = None
    """Sequences one engine decodes at a time; None: vLLM's default."""
    cpu_kv_cache_gb: Annotated[float, Field(gt=0)] = 1.0
    cpu_threads: Positive | None = None
    """Threads of one engine on cpu; None: all cores divided by the engines."""
    timeout: Annotated[float, Field(gt=0)] = 7200.0
    """Seconds for one step's responses, of each round of train.filter, before the run is ended with an error; --dry-run
    says what they may take."""
    heartbeat: Annotated[float, Field(gt=0)] = 120.0
    """Seconds until an engine at work that does not answer is killed; more than a forward or a weight bucket takes."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """Engines that are started again, in all, before the run saves and ends with the error; none where colocated."""
    ahead: Annotated[int, Field(ge=0, le=1)] = 0
    """Weight versions by which responses may be older than the weights that train on them. 0: none, as in the paper. 1:
    engines draw the next step's while this one trains (parallel.colocate=false). No more: with a sync between two
    batches a further one would wait in a queue, and save no time but where steps take unequally long."""
    record: bool = False
    """Write every response with its tokens and log-probs to samples/step_NNNNNN.pt, for rollout.replay."""
    replay: Expanded | None = None
    """Folder of a recorded run, or its samples/: train on its responses; no engine is started."""

    @property
    def context(self) -> int:
        return self.max_prompt_tokens + self.max_new_tokens


MAX_SENDERS = 8
"""Of all stages together, unless they are more: each is a process group on every engine worker, with its buffers."""


class WeightSync(Section):
    transport: Literal["auto", "nccl", "ipc", "gloo", "shared_memory"] = "auto"
    """auto: nccl on cuda (ipc if colocated), shared_memory on cpu on one node, gloo on cpu on several."""
    senders: Literal["auto", 1] = "auto"
    """auto: over gloo and nccl a policy rank of each pipeline stage and share of its experts sends; 1: rank 0 alone."""
    deadline: Annotated[float, Field(gt=0)] = 300.0
    """Seconds for one sync before it is an error."""
    port: Port | None = None
    """Where trainer and engines meet over gloo or nccl, on the first training node; None: a free port."""
    verify: bool = True
    """Compare checksums of what was sent and what arrived."""


class Evaluation(Section):
    problems: Annotated[int, Field(ge=0)] = 256
    """Held-out problems evaluated before and after training (at most); 0: none."""
    every: Annotated[int, Field(ge=0)] = 0
    """Also evaluate each this many steps; 0: only before and after."""
    temperature: Annotated[float, Field(ge=0)] = 0.1
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    samples: Positive = 1


class Checkpoint(Section):
    every: Annotated[int, Field(ge=0)] = 50
    """Save each this many steps; 0: never, and not on a signal either."""
    asynchronous: bool = True
    """Write while the next step's responses are generated; false: the step waits until the checkpoint is whole."""
    keep_last: Positive = 2
    """Newest whole checkpoints that are kept."""
    keep_best: bool = True
    """Also keep the best one: by held-out accuracy where it was evaluated, else by mean reward."""
    resume: Literal["never", "auto"] | Expanded = "never"
    """auto: from the newest whole checkpoint in run.dir, else from the start. Or the folder of one (step_NNNNNN)."""
    on_signal: bool = True
    """SIGTERM and SIGINT save the state after the last finished step before the run ends."""
    signal_timeout: Annotated[float, Field(gt=0)] = 10.0
    """Seconds that finishing the update in progress and saving may take after a signal; then the run ends unsaved."""
    error_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that saving the last finished step may take after an error that ends the run."""
    export_hf: bool = True
    """Write a Hugging Face folder after the last step."""


class Estimate(Section):
    """What --dry-run assumes for its time a step; no run reads it. Replace the guesses by what you measure."""

    prompt_tokens: Positive = 200
    """Mean tokens of a prompt."""
    response_tokens: Positive = 1500
    """Mean tokens of a response; rollout.max_new_tokens at most."""
    engine_tokens_per_second: Annotated[float, Field(gt=0)] = 2000.0
    """Generated by one engine device, all its sequences together."""
    device_tflops: Annotated[float, Field(gt=0)] = 312.0
    """Peak of a training device [10^12 FLOP/s]; A800 in bf16: 312."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of that peak that training reaches."""


class Recipe(Section):
    """Every setting of a run. A recipe file lists only what differs from these defaults (the paper's settings)."""

    run: Run = Run()
    model: Model
    task: Task = Task()
    reward: Reward = Reward()
    method: Method = Method()
    loss: Loss = Loss()
    correction: Correction = Correction()
    kl: KL = KL()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    parallel: Parallel = Parallel()
    rollout: Rollout = Rollout()
    weight_sync: WeightSync = WeightSync()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    monitor: Monitor = Monitor()
    estimate: Estimate = Estimate()

    @property
    def transport(self) -> str:
        if self.weight_sync.transport != "auto":
            return self.weight_sync.transport
        if self.run.device == "cuda":
            return "ipc" if self.parallel.colocate else "nccl"
        return "shared_memory" if self.parallel.nodes == 1 else "gloo"

    @property
    def senders(self) -> int:
        """Policy ranks that send weights to the engines side by side, as many in every pipeline stage."""
        p = self.parallel
        if self.weight_sync.senders == 1 or self.transport not in ("gloo", "nccl") or p.backend != "megatron":
            return 1
        each = max(MAX_SENDERS // p.pipeline, 1)
        return p.pipeline * max(n for n in range(1, min(each, p.expert) + 1) if p.expert % n == 0)

    @property
    def sync_backend(self) -> str:
        """The transport, as trainer and engines name it in `weight_sync.TRANSPORTS`."""
        return self.transport + ("_senders" if self.senders > 1 else "")

    @property
    def engine_dtype(self) -> str:
        if self.rollout.dtype != "auto":
            return self.rollout.dtype
        return {"bf16": "bfloat16", "fp32": "float32"}[self.model.dtype]

    @property
    def generates(self) -> bool:
        """Engines make the responses; a replay reads them."""
        return self.rollout.replay is None

    @property
    def shares_prompts(self) -> bool:
        """Responses carry their prompt once; else why not is in `memory.report`."""
        return self.train.share_prompts and self.parallel.context == 1 and self.parallel.backend == "megatron"

    @property
    def settings(self) -> dict[str, Any]:
        """Every "section.key" with its value."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {f"{name}.{key}": value for name, section in sections.items() for key, value in section}

    @property
    def paths(self) -> dict[str, Path]:
        """Every path with its key; those of a list of data files have their place in it, task.train.0."""
        found = {}
        for key, value in self.settings.items():
            listed = value if isinstance(value, list) else []
            found |= {key: value} if isinstance(value, Path) else {}
            found |= {f"{key}.{i}": entry.path for i, entry in enumerate(listed) if isinstance(entry, DataFile)}
        return found

    @property
    def updates_per_step(self) -> int:
        return self.train.prompts_per_step // self.train.prompts_per_update

    def chose(self, key: str) -> bool:
        """The value of "section.key" was left to this machine or day, so that another one may choose otherwise."""
        section, name = key.split(".")
        return name not in getattr(self, section).model_fields_set

    def with_chosen(self, key: str, value: Any) -> "Recipe":
        """The recipe with what `model.dtype: auto`, or `task.date: null`, is to mean."""
        section, name = key.split(".")
        chosen = getattr(self, section).model_copy(update={name: value})
        chosen.model_fields_set.discard(name)  # chosen, not given
        return self.model_copy(update={section: chosen})

    @model_validator(mode="after")
    def _resolve_dtype(self) -> "Recipe":
        if self.model.dtype == "auto":
            resolved = self.with_chosen("model.dtype", native_dtype(self.run.device))
            object.__setattr__(self, "model", resolved.model)  # frozen for everyone else
        return self

    @model_validator(mode="after")
    def _cross_field_rules(self) -> "Recipe":
        broken = [text for holds, text in rules(self) if not holds]
        if broken:
            raise ValueError("\n".join(broken))
        return self
