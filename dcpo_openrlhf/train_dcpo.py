"""Entry: recipe -> preflight -> Ray -> trainer.

python -m dcpo_openrlhf.train_dcpo --recipe FILE [section.key=value ...] [--dry-run]
"""

import argparse
import contextlib
import datetime
import importlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO, cast

from dcpo_openrlhf import local_ray, signals
from dcpo_openrlhf.checkpoint import disk_full
from dcpo_openrlhf.errors import RunError, one_line
from dcpo_openrlhf.monitor.causes import MonitorStop
from dcpo_openrlhf.prompts import read_prompts
from dcpo_openrlhf.recipe import preflight, resume
from dcpo_openrlhf.recipe.load import load_recipe, resolved_yaml
from dcpo_openrlhf.recipe.schema import Recipe, RecipeError
from dcpo_openrlhf.rollout import chat, tasks
from dcpo_openrlhf.signals import Interrupted

if TYPE_CHECKING:
    from dcpo_openrlhf.trainer import DCPOTrainer

logger = logging.getLogger("dcpo_openrlhf")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when the recipe ran to its end, 1 where it could not go on or Ray did not start, 2 when recipe or
    data cannot run, 3 where the monitor ended it, 128 + signal after a signal.
    """
    arguments = _parser().parse_args(argv)
    log_to(sys.stdout)
    try:
        recipe = resume.keep_chosen(load_recipe(arguments.recipe, arguments.overrides))
        if not arguments.dry_run and resume.finished(recipe):
            logger.info("the run in %s is finished, report and all: nothing is left to do", recipe.run.dir)
            return 0
        lacking = preflight.check(recipe, dry_run=arguments.dry_run)
        if arguments.dry_run:
            if not lacking:
                tokenizer = _tokenizer(recipe)
                recipe = _dated(recipe, tokenizer)
                read_prompts(recipe, tokenizer)  # the data's errors too, where data and model are here
            print(resolved_yaml(recipe) + preflight.plan(recipe, lacking))
            return 0
        for hint in preflight.hints(recipe):
            logger.warning("%s", hint)
        run(recipe)
    except (RecipeError, tasks.TaskError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except MonitorStop as stop:
        print(f"ended by the monitor: {stop}", file=sys.stderr)
        return 3
    except KeyboardInterrupt as interrupted:  # Interrupted, or Ctrl-C while recipe and data are checked
        number = interrupted.args[0] if isinstance(interrupted, Interrupted) else signal.SIGINT
        print(f"ended by {signal.Signals(number).name}; every process of this run is gone", file=sys.stderr)
        return 128 + number
    return 0


def run(recipe: Recipe, *, serving: Any = None, then: Callable[["DCPOTrainer"], None] | None = None) -> None:
    """Start everything, train, and leave nothing behind. serving: as in `started`; then: called with the trainer that
    has come to its end, while policy and engines are up.
    """
    c = recipe.checkpoint
    bound = c.signal_timeout if c.every and c.on_signal else 0.0
    with started(recipe, signal_bound=bound, serving=serving) as trainer:
        try:
            if recipe.train.rollout_only:
                from dcpo_openrlhf.rollout_only import generate_only

                generate_only(trainer)
            else:
                trainer.fit()
            if then is not None:
                then(trainer)
        except KeyboardInterrupt:
            if bound:
                _before_exit(trainer.saving.before_exit, signals.seconds_left())
            raise
        except Exception as error:
            from dcpo_openrlhf.policy import deaths

            if c.every:
                _save_after_error(trainer, c.error_timeout)
            told = disk_full(error, recipe.run.dir) or deaths.told(error, trainer.actor_model_group)
            if told is not None and not isinstance(error, RunError):
                raise told from error
            raise


@contextlib.contextmanager
def started(recipe: Recipe, *, signal_bound: float = 0.0, serving: Any = None) -> Iterator["DCPOTrainer"]:
    """The recipe's trainer, with data read, Ray joined or started, graders, engines and policy up: all of it is ended
    on the way out. SIGINT and SIGTERM raise Interrupted inside; signal_bound as in signals.raising. serving: engines
    that another run of this process left, as `create_engines` makes them; they and their Ray stay.
    """
    tokenizer = _tokenizer(recipe)
    recipe = _dated(recipe, tokenizer)
    prompts, heldout = read_prompts(recipe, tokenizer)  # data errors come before anything is started
    with resume.held(recipe.run.dir), signals.raising(signal_bound) as install, contextlib.ExitStack() as stack:
        point = resume.resume_point(recipe)
        if point is not None:
            prompts.load_state_dict(point.state()["prompts"])
            tasks.require_same_heldout(heldout, point.state().get("heldout"))
        resume.prepare_run_folder(recipe, point)
        local_ray.raise_bounds()  # Ray reads them when it is imported
        with _importing("dcpo_openrlhf.trainer", "dcpo_openrlhf.policy.actor"):
            if serving is None:
                join_ray(recipe, stack)
        install()  # ray.init put a handler of its own in place, which aborts
        from dcpo_openrlhf.openrlhf_seam import RecipeStrategy
        from dcpo_openrlhf.reward.pool import GraderPool
        from dcpo_openrlhf.trainer import DCPOTrainer

        strategy = RecipeStrategy(recipe)
        grader = stack.enter_context(
            GraderPool(
                workers=recipe.reward.workers,
                extractor=recipe.reward.default,
                deadline_s=recipe.reward.deadline,
                batch_deadline_s=recipe.reward.batch_deadline,
                by_source=recipe.reward.by_source,
                batch_size=recipe.reward.function_batch,
                success_threshold=recipe.reward.success_threshold,
            )
        )
        engines, group = _start_actors(recipe, strategy, stack, serving)
        yield DCPOTrainer(
            strategy, group, engines, tokenizer, prompts=prompts, heldout=heldout, grader=grader, point=point
        )


def _before_exit(save: Callable[[], Any], seconds: float, *, bound: str = "checkpoint.signal_timeout") -> None:
    """save() in at most `seconds`; where that fails, say so: the run ends for another reason, and that one is told."""
    try:
        with signals.limit(seconds):
            save()
    except signals.OutOfTime:
        logger.warning("no checkpoint of the last step: %s is over; the last whole one stays", bound)
    except Exception as error:
        logger.warning("no checkpoint of the last step (%s); the last whole one stays", one_line(error))


def _save_after_error(trainer: "DCPOTrainer", seconds: float) -> None:
    """A checkpoint of the last finished step, where the weights are still that step's; else say what is lost."""
    if trainer.saving.in_hand is None:
        _before_exit(trainer.saving.before_exit, seconds, bound="checkpoint.error_timeout")
        return
    _before_exit(trainer.saving.checkpoints.finish, seconds, bound="checkpoint.error_timeout")
    saved = trainer.saving.checkpoints.saved_step
    logger.warning(
        "the update of step %d was under way, so the weights are no finished step's: of %d steps after the newest "
        "checkpoint (step %d) nothing is saved",
        trainer.saving.in_hand,
        trainer.saving.in_hand - saved,
        saved,
    )


def log_to(stream: TextIO) -> None:
    """One line a step from this package; from the libraries, warnings that a user can act on."""
    logging.basicConfig(
        format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, stream=stream, force=True
    )
    logger.setLevel(logging.INFO)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|ray|megatron|deepspeed)\b")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dcpo_openrlhf.train_dcpo", description="Fine-tune a language model with DCPO."
    )
    parser.add_argument(
        "--recipe", required=True, metavar="FILE", help="YAML; it lists only what differs from the schema's defaults"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="validate, print the resolved recipe, plan and memory; start nothing"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="typed by the schema, for example train.steps=10"
    )
    return parser


def _tokenizer(recipe: Recipe) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    except Exception as error:  # transformers and what it stands on raise classes of their own for a bad config.json
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise RecipeError(f"the tokenizer of {recipe.model.path} cannot be loaded ({reason}); complete it") from error
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise RecipeError(
            f"the tokenizer of {recipe.model.path} has eos_token_id = {tokenizer.eos_token_id} and "
            f"pad_token_id = {tokenizer.pad_token_id}; set both in its tokenizer_config.json, or responses never end"
        )
    return tokenizer


def _dated(recipe: Recipe, tokenizer: Any) -> Recipe:
    """The recipe with today as task.date where that is open and the chat template writes the date."""
    t = recipe.task
    if not t.chat or t.date is not None:
        return recipe
    if not chat.asks_for_date(tokenizer, system=t.system, variables=t.chat_template_kwargs):
        return recipe
    return recipe.with_chosen("task.date", _today())


def _today() -> datetime.date:
    return datetime.date.today()


@contextlib.contextmanager
def _importing(*modules: str) -> Iterator[None]:
    """Import the modules while the block waits for other processes: seconds that bad input should not cost."""

    def load() -> None:
        with contextlib.suppress(Exception):  # told where they are imported in earnest
            for module in modules:
                importlib.import_module(module)

    thread = threading.Thread(target=load, name="importing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()  # an interpreter that ends must not meet it in an extension module


def join_ray(recipe: Recipe, stack: contextlib.ExitStack) -> None:
    """Connect to the announced cluster, or start a local one that ends with the run; refuse one that is too small."""
    import ray

    address = recipe.run.ray_address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": recipe.run.worker_logs, "logging_level": logging.WARNING}
    if address:
        ray.init(address=address, **options)
    else:
        # trainer and engines share the cores: threads that wait must sleep
        for name, value in {"RAY_worker_niceness": "0", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}.items():
            os.environ.setdefault(name, value)
        if recipe.run.device == "cpu":
            options |= {"num_cpus": recipe.run.logical_devices, "num_gpus": recipe.run.logical_devices}
        local_ray.start(include_dashboard=False, **options)
    stack.callback(ray.shutdown)
    resources = ray.cluster_resources()
    preflight.check_cluster(recipe, gpus=resources.get("GPU", 0), cpus=resources.get("CPU", 0))


def _start_actors(recipe: Recipe, strategy: Any, stack: contextlib.ExitStack, serving: Any = None) -> tuple[Any, Any]:
    """Rollout engines (none for a replay) and policy ranks (None where nothing is trained), started side by side.

    Both are ended when the stack unwinds; engines that serve already are taken as they are, and stay.
    """
    import ray
    from ray.util.placement_group import remove_placement_group

    from dcpo_openrlhf.policy.actor import ACTORS
    from dcpo_openrlhf.policy.group import PolicyActorGroup
    from dcpo_openrlhf.rollout.devices import device_group, rank_bundles
    from dcpo_openrlhf.rollout.pool import COLOCATED_SHARE, shutdown_engines, sleep, wait_until_ready

    p, begin, bound = recipe.parallel, time.monotonic(), recipe.run.startup_timeout
    trains = not recipe.train.rollout_only
    # before the engines', so that these take what whole nodes leave
    what = "training and engines" if p.colocate else f"training, {p.nodes} nodes * {p.devices_per_node}"
    devices = bundles = None
    if trains:
        devices = device_group(p.world_size, bound, what=what)
        if serving is not None:  # this Ray stays: it gives them to the next run
            stack.callback(remove_placement_group, devices)
        bundles = rank_bundles(devices, p, bound, on_gpus=recipe.run.device == "cuda")
    shared = devices if p.colocate else None
    engines: Any = serving
    if serving is None:
        engines = create_engines(recipe, shared) if recipe.generates else []
        stack.callback(shutdown_engines, engines, recipe.run.shutdown_timeout)
    group = None
    if trains:
        share: Any = COLOCATED_SHARE if shared else 1  # annotated int by OpenRLHF, which itself passes fractions
        actor: Any = ACTORS[p.backend]
        options: Any = {"timeout_s": bound, "bundles": bundles}
        group = PolicyActorGroup(p.nodes, p.devices_per_node, actor, cast(Any, devices), share, **options)
        stack.callback(_kill, group)
    ranks = p.world_size if group else 0
    logger.info("starting %d rollout engines and %d policy ranks", 0 if serving else len(engines), ranks)
    if shared:  # one after the other: each needs the device's memory to be built
        wait_until_ready(engines, bound)
        sleep(engines, bound)
    if group is not None:
        group.begin_init(strategy, recipe.train.steps * recipe.updates_per_step)
    wait_until_ready(engines, bound)
    if group is not None:
        group.finish_init(engines, timeout=bound)
    logger.info(
        "engines and policy are ready after %.0f s (%s)",
        time.monotonic() - begin,
        ray.cluster_resources().get("GPU", 0),
    )
    return engines, group


def create_engines(recipe: Recipe, shared: Any = None) -> Any:
    """The recipe's engines, which start in the background; shared: the policy's devices, where they are colocated."""
    from dcpo_openrlhf.rollout.pool import create_rollout_engines

    r = recipe.rollout
    engines = create_rollout_engines(
        count=r.engines,
        tensor_parallel=r.tensor_parallel,
        model=str(recipe.model.path),
        seed=recipe.run.seed,
        max_model_len=r.context,
        dtype=recipe.engine_dtype,
        device=recipe.run.device,
        transport=recipe.sync_backend,
        placement_group=shared,
        enable_sleep=shared is not None and recipe.run.device == "cuda",  # vLLM's CPU build has no such mode
        gpu_memory_utilization=r.gpu_memory_utilization,
        cpu_kv_cache_gb=r.cpu_kv_cache_gb,
        cpu_threads=r.cpu_threads,
        enforce_eager=r.enforce_eager or recipe.run.device == "cpu",
        enable_prefix_caching=r.enable_prefix_caching,
        trust_remote_code=recipe.model.trust_remote_code,
        max_num_seqs=r.max_sequences,
        timeout_s=recipe.run.startup_timeout,
    )
    engines.heartbeat_s = r.heartbeat
    engines.restarts = 0 if shared else r.restarts  # one that starts needs a device that the policy has left
    return engines


def _kill(group: Any) -> None:
    import ray

    for actor in group._actor_handlers:
        ray.kill(actor)


if __name__ == "__main__":
    sys.exit(main())
