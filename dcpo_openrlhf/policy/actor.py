"""One rank of the policy as a Ray actor: OpenRLHF's BaseModelActor around a trainer."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

from dcpo_openrlhf import phases
from dcpo_openrlhf.openrlhf_seam import RecipeStrategy, make_importable
from dcpo_openrlhf.phases import phase
from dcpo_openrlhf.profiling import Recording
from dcpo_openrlhf.recipe.resume import STOP
from dcpo_openrlhf.recipe.schema import Recipe

make_importable()

from openrlhf.trainer.ray.launcher import BaseModelActor  # noqa: E402

from dcpo_openrlhf.policy.reference import Reference  # noqa: E402
from dcpo_openrlhf.policy.rows import Rows  # noqa: E402
from dcpo_openrlhf.policy.wire import received, sent  # noqa: E402

if TYPE_CHECKING:
    from dcpo_openrlhf.checkpoint import FileSum
    from dcpo_openrlhf.policy.deepspeed.checkpoint import ZeroCheckpoint
    from dcpo_openrlhf.policy.deepspeed.memory import ZeroOffload
    from dcpo_openrlhf.policy.deepspeed.step import ZeroStep
    from dcpo_openrlhf.policy.megatron.checkpoint import PolicyCheckpoint
    from dcpo_openrlhf.policy.megatron.memory import Offload
    from dcpo_openrlhf.policy.megatron.step import PolicyStep
    from dcpo_openrlhf.weight_sync.source import LiveWeights


class PolicyActor(BaseModelActor):
    """One rank of the policy. Each method is one call into the trainer's folder, which a subclass names."""

    step: Any
    """PolicyStep or ZeroStep."""

    def init_model_from_pretrained(self, strategy: RecipeStrategy, pretrain: str, max_steps: int) -> int:
        """Build this rank's model and optimizer; returns its data-parallel rank."""
        recipe = strategy.recipe
        self.strategy = strategy
        self.strategy.rank = self._rank
        if recipe.run.device == "cpu":
            # Ray sets OMP_NUM_THREADS to the actor's CPU share; ranks share the machine's cores
            torch.set_num_threads(recipe.parallel.threads(os.cpu_count() or 1))
        torch.manual_seed(recipe.run.seed)
        step, policy = self._build(recipe)
        self.step = step(
            policy,
            optimizer=recipe.optimizer,
            loss=recipe.loss,
            kl=recipe.kl,
            micro_batch_size=recipe.train.micro_batch_size,
            micro_batch_tokens=recipe.train.micro_batch_tokens,
            share_prompts=recipe.shares_prompts,
            total_updates=max_steps,
        )
        self.step.stop_asked = (recipe.run.dir / STOP).exists
        self.mesh = self.step.mesh
        self.reference = Reference(self._held()) if recipe.kl.coefficient else None
        self._updates: list[Rows] = []
        self.weight_sync: Any = None
        return self.mesh.data_rank

    def _build(self, recipe: Recipe) -> tuple[type, Any]:
        """PolicyStep or ZeroStep, and this rank's policy for it."""
        raise NotImplementedError

    def _held(self) -> Iterator[torch.Tensor]:
        """Every tensor of this rank's that a forward reads."""
        raise NotImplementedError

    def _shapes(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Hugging Face names, dtypes and shapes, without communication, in the order of `_tensors`."""
        raise NotImplementedError

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full Hugging Face tensors, one at a time; a collective of all ranks."""
        raise NotImplementedError

    def _source(self) -> "LiveWeights":
        """What a weight sync sends."""
        from dcpo_openrlhf.weight_sync.source import LiveWeights

        return LiveWeights(shapes=self._shapes, tensors=self._tensors)

    def connect(self, engines: Sequence[Any], version: int = 0) -> None:
        """Let the weights of this rank's policy reach the engines, which are ready; the next sync is `version` + 1."""
        from dcpo_openrlhf import weight_sync

        recipe: Recipe = self.strategy.recipe
        self.weight_sync = weight_sync.connect(
            transport=recipe.sync_backend,
            rank=self._rank,
            engines=engines,
            source=self._source(),
            deadline_s=recipe.weight_sync.deadline,
            engine_world_size=recipe.rollout.tensor_parallel,
            verify=recipe.weight_sync.verify,
            version=version,
            instead_of=self.weight_sync,
            port=recipe.weight_sync.port,
        )

    def execute_batch(self, method_name: str, all_data: dict[str, Any], start_idx: int, end_idx: int) -> list[Any]:
        """As OpenRLHF's, of what `PolicyActorGroup.async_run_method_batch` sent."""
        data = {name: [received(item) for item in items] for name, items in all_data.items()}
        return [sent(result) for result in super().execute_batch(method_name, data, start_idx, end_idx)]

    @phase("statistics")
    def token_statistics(
        self, rows: Rows, temperatures: list[float], reference: bool = False
    ) -> dict[str, torch.Tensor] | None:
        """Token statistics of this data rank's rows, and which these are; None from all but one rank of a replica.

        reference: those of the starting model.
        """
        with self.reference.in_place() if reference and self.reference else contextlib.nullcontext():
            stats = self.step.token_statistics(rows, temperatures=temperatures)
        assert rows.index is not None
        return stats | {"index": rows.index} if self.mesh.is_data_leader else None

    def greedy(self, prompts: list[list[int]], max_new_tokens: int, eos: int) -> list[list[int]]:
        """The trainer's own greedy continuations, to compare with an engine's."""
        return self.step.greedy(prompts, max_new_tokens=max_new_tokens, eos=eos)

    def append(self, experience: Rows) -> None:
        """Keep this data rank's rows of one update for `fit`."""
        self._updates.append(experience)

    @phase("update")
    def fit(self, kl_ctl: float = 0.0) -> dict[str, float]:
        """One optimizer step for each appended update; the mean of their metrics, the same on every rank."""
        updates, self._updates = self._updates, []
        metrics = [self.step.update(rows, entropy_coefficient=rows.entropy_coefficient) for rows in updates]
        if self.mesh.device.type == "cpu":
            self.empty_cache()
        return {name: sum(m[name] for m in metrics) / len(metrics) for name in metrics[0]}

    @phase("sync")
    def broadcast_to_vllm(self) -> int:
        """Send the weights to every engine; returns their new version."""
        self.weight_sync.send_weights()
        return self.weight_sync.version

    def sent_checksums(self) -> dict[str, int]:
        """name -> checksum of what this rank sent in the last sync; empty where it sends none and with checks off."""
        return self.weight_sync.checksums

    def scale_weights(self, factor: float) -> None:
        """Multiply every weight, so that a check sees new ones arrive; the policy is not to be trained afterwards."""
        raise NotImplementedError

    @cached_property
    def checkpoint(self) -> "PolicyCheckpoint | ZeroCheckpoint":
        raise NotImplementedError

    @phase("save")
    def save_checkpoint(self, folder: str) -> None:
        """Copy this rank's state; a thread writes it to the folder."""
        self.checkpoint.save(Path(folder))

    @phase("save")
    def finish_checkpoint(self) -> "dict[str, FileSum]":
        """Wait for that thread; sums of the files that this rank wrote."""
        return self.checkpoint.finish()

    def load_checkpoint(self, folder: str, weights_version: int) -> None:
        """Continue where the checkpoint was saved; the next weight sync counts on from `weights_version`."""
        self.checkpoint.load(Path(folder))
        if self.weight_sync is not None:
            self.weight_sync.version = weights_version

    @phase("export")
    def save_model(self, output: str) -> str:
        """Write the policy as a Hugging Face folder (rank 0 writes, the others help to gather)."""
        from transformers import AutoTokenizer

        from dcpo_openrlhf.policy.hf_folder import write_hf_folder
        from dcpo_openrlhf.rollout.chat import stop_tokens

        tensors = self._tensors()
        if self._rank == 0:
            recipe: Recipe = self.strategy.recipe
            tokenizer = AutoTokenizer.from_pretrained(
                recipe.model.path, trust_remote_code=recipe.model.trust_remote_code
            )
            stops = stop_tokens(tokenizer, chat=recipe.task.chat, stop=recipe.rollout.stop)
            write_hf_folder(tensors, source=recipe.model.path, output=Path(output), stop_token_ids=stops)
        else:
            for _ in tensors:
                pass
        return output

    @cached_property
    def _offload(self) -> "Offload | ZeroOffload":
        raise NotImplementedError

    @phase("offload")
    def offload(self) -> None:
        """Move weights and optimizer to host memory: colocated engines generate now."""
        self._offload.away()
        self.empty_cache()

    @phase("onload")
    def onload(self) -> None:
        """Take weights and optimizer back to the device."""
        self._offload.back()

    def take_phases(self) -> list[phases.Phase]:
        return phases.take()

    def begin_profile(self) -> None:
        """Record what this rank does, the first of its pipeline stage; the others do alike."""
        self._recording = Recording(self.mesh.device.type) if self.mesh.is_stage_leader else None

    def end_profile(self, folder: str, prefix: str) -> None:
        if self._recording is not None:
            self._recording.write(Path(folder), f"{prefix}_policy_stage{self.mesh.pipeline_rank}")
            self._recording = None

    def peak_flops(self) -> float | None:
        """FLOP/s that this rank's device reaches at most in the model's format; None where it is not known."""
        from dcpo_openrlhf.policy.peaks import peak_flops

        return peak_flops(self.mesh.device, self.step.policy.dtype)

    def peak_memory_gib(self) -> float:
        """Peak resident memory of this process, or of its device on cuda [GiB]."""
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def empty_cache(self) -> None:
        """Give freed memory back to the device or, on cpu, to the system."""
        if self.mesh.device.type == "cuda":
            super().empty_cache()
        else:
            from dcpo_openrlhf.policy import cpu

            cpu.return_freed_memory()


class MegatronActorBase(PolicyActor):
    """A rank of megatron-core's mesh; `MegatronActor` is the Ray class of it."""

    step: "PolicyStep"

    def _build(self, recipe: Recipe) -> tuple[type, Any]:
        if recipe.run.device == "cpu":
            from dcpo_openrlhf.policy.megatron import cpu

            cpu.install()
        from dcpo_openrlhf.policy.megatron.mesh import init_mesh
        from dcpo_openrlhf.policy.megatron.model import build_policy
        from dcpo_openrlhf.policy.megatron.step import PolicyStep

        mesh = init_mesh(
            recipe.parallel,
            device=recipe.run.device,
            rank=self._rank,
            world_size=self._world_size,
            seed=recipe.run.seed,
        )
        return PolicyStep, build_policy(model=recipe.model, parallel=recipe.parallel, train=recipe.train, mesh=mesh)

    def _held(self) -> Iterator[torch.Tensor]:
        return (weight for _, weight in self.step.policy.entries())

    def _shapes(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        from dcpo_openrlhf.policy.megatron.model import hf_shapes

        return hf_shapes(self.step.policy)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        from dcpo_openrlhf.policy.megatron.model import hf_tensors

        return hf_tensors(self.step.policy)

    def _source(self) -> "LiveWeights":
        recipe: Recipe = self.strategy.recipe
        if recipe.senders == 1:
            return super()._source()
        from dcpo_openrlhf.policy.megatron.senders import sent_shapes, sent_tensors
        from dcpo_openrlhf.weight_sync.source import SharedWeights

        policy, per_stage = self.step.policy, recipe.senders // recipe.parallel.pipeline
        return SharedWeights(
            shapes=lambda: sent_shapes(policy, per_stage), tensors=lambda: sent_tensors(policy, per_stage)
        )

    def scale_weights(self, factor: float) -> None:
        with torch.no_grad():
            for _, weight in self.step.policy.entries():  # a router's correction bias is one and no parameter
                weight.mul_(factor)

    @cached_property
    def checkpoint(self) -> "PolicyCheckpoint":
        from dcpo_openrlhf.policy.megatron.checkpoint import PolicyCheckpoint

        return PolicyCheckpoint(self.step)

    @cached_property
    def _offload(self) -> "Offload":
        from dcpo_openrlhf.policy.megatron.memory import Offload

        return Offload(self.step)


class ZeroActorBase(PolicyActor):
    """A rank of OpenRLHF's DeepSpeed strategy; `ZeroActor` is the Ray class of it. Imports no megatron-core."""

    step: "ZeroStep"

    def _build(self, recipe: Recipe) -> tuple[type, Any]:
        from dcpo_openrlhf.policy.deepspeed.model import build_policy
        from dcpo_openrlhf.policy.deepspeed.step import ZeroStep

        return ZeroStep, build_policy(recipe)

    def _held(self) -> Iterator[torch.Tensor]:
        from dcpo_openrlhf.policy.deepspeed.model import held

        return held(self.step.policy)

    def _shapes(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        from dcpo_openrlhf.policy.deepspeed.model import hf_shapes

        return hf_shapes(self.step.policy)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        from dcpo_openrlhf.policy.deepspeed.model import hf_tensors

        return hf_tensors(self.step.policy)

    def scale_weights(self, factor: float) -> None:
        from dcpo_openrlhf.policy.deepspeed.model import scale_weights

        scale_weights(self.step.policy, factor)

    @cached_property
    def checkpoint(self) -> "ZeroCheckpoint":
        from dcpo_openrlhf.policy.deepspeed.checkpoint import ZeroCheckpoint

        return ZeroCheckpoint(self.step)

    @cached_property
    def _offload(self) -> "ZeroOffload":
        from dcpo_openrlhf.policy.deepspeed.memory import ZeroOffload

        return ZeroOffload(self.step)


MegatronActor = ray.remote(num_gpus=1)(MegatronActorBase)
ZeroActor = ray.remote(num_gpus=1)(ZeroActorBase)
ACTORS = {"megatron": MegatronActor, "deepspeed": ZeroActor}
"""parallel.backend -> its Ray class."""
