"""Benchmark models: sample with vLLM, grade, and put Avg@k and Pass@k into one table. Details: docs/evaluate.md.

python -m tools.evaluate --model DIR --benchmark aime24 --data aime24.jsonl --samples 32

Every sample is kept as soon as it is finished, so a call that was cut off is continued by calling it again; so is one
that asks for more samples or problems. Grades are computed from the kept samples at the end of every call.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dcpo_openrlhf.grading import question
from dcpo_openrlhf.recipe.preflight import why_not_imported
from dcpo_openrlhf.reward.pool import BUILT_IN, Grade, GraderError, GraderPool, check_question
from dcpo_openrlhf.rollout.chat import render, stop_tokens
from dcpo_openrlhf.rollout.files import SUFFIXES, is_saved
from dcpo_openrlhf.rollout.tasks import Problem, Prompt, TaskError, check_prompt_lengths, prompt_template
from tools.data_rows import names
from tools.prepare_data import SET_OF_ALIAS, SOURCES, PrepareError, load_problems
from tools.sample_file import EvaluationError, Key, Request, Sample, SampleFile
from tools.sampler import Generate, Generator, ModelFolder, vllm_generator
from tools.scores import CONTESTS, Result, estimate, paper_backbones, pass_at_k, table

BENCHMARKS = [name for name, source in SOURCES.items() if source.kind == "test"]


@dataclass(frozen=True)
class Preset:
    """Sampling settings of the DCPO paper (arXiv 2601.12730)."""

    temperature: float
    samples: int
    contest_samples: int
    """Samples a problem where a set has only some thirty problems (CONTESTS)."""
    top_p: float = 0.95


LONGEST_DEADLINE = 3600
"""[s] Of one comparison: beyond an hour it is a slip, and a kernel's alarm takes no infinity."""
PRESETS = {
    "pass1": Preset(temperature=0.1, samples=1, contest_samples=32),
    "pass128": Preset(temperature=0.6, samples=128, contest_samples=128),
}

# --- one model on one benchmark --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What is sampled: some problems, each `samples` times."""

    benchmark: str
    problems: list[Problem]
    prompts: list[str]
    samples: int
    settings: dict[str, Any]
    """What makes samples comparable; kept as the header of their file."""
    path: Path

    @cached_property
    def keys(self) -> list[Key]:
        """Sample 0 of every problem first: a call that is cut off has seen as many problems as it could."""
        return [(p.id, n) for n in range(self.samples) for p in self.problems]


def sample_seed(seed: int, key: Key) -> int:
    """48 bits that depend on the seed, the problem and the sample's number alone: the same after a restart."""
    digest = hashlib.blake2b(f"{seed}:{key[1]}:{key[0]}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


def fill(job: Job, file: SampleFile, generate: Callable[[], Generate], *, seed: int, title: str) -> None:
    """Generate what the file lacks of the job. `generate` is asked for only if something is missing."""
    prompt_of = dict(zip((p.id for p in job.problems), job.prompts, strict=True))
    missing = [Request(key, prompt_of[key[0]], sample_seed(seed, key)) for key in job.keys if key not in file.samples]
    samples = generate()(missing) if missing else iter(())
    total = len(job.keys)
    with tqdm(total=total, initial=total - len(missing), desc=title, unit="sample", smoothing=0.05) as bar:
        for sample in samples:
            file.append(sample)
            bar.update()


def score(job: Job, samples: dict[Key, Sample], pool: GraderPool) -> tuple[Result, list[Grade]]:
    """The job's result, and the grade of each of its samples in the order of job.keys."""
    keys = job.keys
    asked = {p.id: question(p, text) for p, text in zip(job.problems, job.prompts, strict=True)}
    chosen = [samples[key] for key in sorted(keys)]  # the samples of a problem together, as in training
    graded = pool.grade([s.response for s in chosen], [asked[s.key[0]] for s in chosen])
    grade_of = dict(zip(sorted(keys), graded, strict=True))
    grades = [grade_of[key] for key in keys]
    correct = dict.fromkeys(asked, 0)
    for (id, _), grade in zip(keys, grades, strict=True):
        correct[id] += grade.success == 1.0
    n, counts = job.samples, list(correct.values())
    sizes = sorted({n, *(2**i for i in range(n.bit_length()) if 2**i <= n)})
    result = Result(
        benchmark=job.benchmark,
        problems=len(job.problems),
        samples=n,
        avg=estimate([c / n for c in counts], samples=n),
        pass_at={k: estimate([pass_at_k(n=n, correct=c, k=k) for c in counts], samples=n) for k in sizes},
        truncated=sum(s.truncated for s in chosen) / len(chosen),
        unanswered=sum(g.extracted is None for g in grades) / len(grades),
        tokens=sum(s.tokens for s in chosen) / len(chosen),
        timeouts=sum(g.timed_out or g.crashed or bool(g.failure) for g in grades),
    )
    return result, grades


def keep(job: Job, result: Result, grades: Sequence[Grade]) -> None:
    """Write NAME.grades.jsonl and NAME.result.json beside the samples NAME.jsonl."""
    rows = ({"id": k[0], "sample": k[1], **asdict(g)} for k, g in zip(job.keys, grades, strict=True))
    job.path.with_suffix(".grades.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job.path.with_suffix(".result.json").write_text(json.dumps(job.settings | asdict(result), indent=1) + "\n")


# --- the command -----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate",
        description="Sample benchmarks with vLLM, grade, and print Avg@k and Pass@k with intervals.",
        epilog=f"benchmarks: {', '.join(BENCHMARKS)}; or any NAME with --data FILE",
    )
    add = parser.add_argument
    add(
        "--model", type=Path, action="append", required=True, metavar="DIR", help="Hugging Face folder; may be repeated"
    )
    add("--benchmark", action="append", required=True, metavar="NAME", help="may be repeated")
    add(
        "--data", type=Path, metavar="FILE", help="the benchmark's file, or a folder of NAME.jsonl; without it, the hub"
    )
    add("--fields", nargs="+", metavar="KEY=COLUMN", help="columns of --data, as task.fields: problem=prompt")
    add("--problems", type=int, metavar="N", help="only the first N problems")
    add("--preset", choices=PRESETS, default="pass1", help="the paper's sampling settings; default: %(default)s")
    add("--samples", type=int, metavar="K", help="a problem; default: the preset's")
    add("--temperature", type=float, help="default: the preset's")
    add("--top-p", type=float, help="default: the preset's")
    add("--max-tokens", type=int, default=8192, help="of a response; default: %(default)s, the paper's")
    add("--seed", type=int, default=0)
    add("--template", default="boxed_think", help="a name of tasks.TEMPLATES or a text with {problem}")
    add("--system", help="system message; default: the chat template's own")
    add("--no-chat", action="store_true", help="send the template as it is, for models without a chat template")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a token that ends a response, beside EOS and the chat template's end of turn; may be repeated",
    )
    add(
        "--extractor",
        default="boxed",
        metavar="GRADER",
        help=f"{', '.join(BUILT_IN)}, or a function, FILE.py:NAME; default: %(default)s",
    )
    add("--deadline", type=float, default=10.0, help="of one symbolic comparison [s]; default: %(default)s")
    add("--output", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="default: %(default)s")
    add("--paper", choices=paper_backbones(), help="add the paper's rows for this backbone")
    add("--dtype", default="auto", help="vLLM's; default: %(default)s")
    add("--tensor-parallel", type=int, default=1, help="devices of the engine; default: %(default)s")
    add("--gpu-memory-utilization", type=float, default=0.9, help="default: %(default)s")
    add("--cpu-kv-cache-gb", type=float, default=2.0, help="default: %(default)s")
    add("--trust-remote-code", action="store_true")
    args = parser.parse_args(argv)
    for name in ("problems", "samples", "max_tokens", "tensor_parallel"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1, not {value}")
    if ":" in args.extractor:
        for reason in why_not_imported(args.extractor):
            parser.error(f"--extractor {reason}")
    elif args.extractor not in BUILT_IN:
        parser.error(f"--extractor is one of {', '.join(BUILT_IN)}, or FILE.py:NAME, not {args.extractor!r}")
    preset = PRESETS[args.preset]
    args.temperature = preset.temperature if args.temperature is None else args.temperature
    args.top_p = preset.top_p if args.top_p is None else args.top_p
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error(f"temperature >= 0 and 0 < top-p <= 1 are needed, not {args.temperature} and {args.top_p}")
    if args.fields and args.data is None:
        parser.error("--fields names the columns of --data FILE; give the file")
    if not 0 < args.deadline <= LONGEST_DEADLINE:
        parser.error(f"--deadline is above 0 and at most {LONGEST_DEADLINE} [s], not {args.deadline:g}")
    if not 0 < args.gpu_memory_utilization <= 1 or not 0 < args.cpu_kv_cache_gb < math.inf:
        parser.error(
            "0 < gpu-memory-utilization <= 1 and cpu-kv-cache-gb > 0 are needed, "
            f"not {args.gpu_memory_utilization:g} and {args.cpu_kv_cache_gb:g}"
        )
    return args


def samples_of(benchmark: str, args: argparse.Namespace) -> int:
    preset = PRESETS[args.preset]
    name = SET_OF_ALIAS.get(benchmark, benchmark)
    return args.samples or (preset.contest_samples if name in CONTESTS else preset.samples)


def benchmark_problems(name: str, args: argparse.Namespace) -> list[Problem]:
    """The problems that are evaluated. Raises EvaluationError, PrepareError or TaskError."""
    path, canonical = args.data, SET_OF_ALIAS.get(name, name)
    if path is not None and path.is_dir() and not is_saved(path):
        stems = [name, canonical, *(SOURCES[canonical].aliases if canonical in SOURCES else ())]
        files = [path / f"{stem}{suffix}" for stem in stems for suffix in (*SUFFIXES, ".csv", "")]
        path = next((file for file in files if file.exists()), None)
        if path is None:
            raise EvaluationError(f"{args.data}: holds none of {', '.join(dict.fromkeys(f.name for f in files))}")
    elif path is not None and len(args.benchmark) > 1:
        raise EvaluationError(f"--data {path} is one file for {len(args.benchmark)} benchmarks; give their folder")
    if path is None and canonical not in BENCHMARKS:
        raise EvaluationError(
            f"no benchmark is named {name!r}; take one of {', '.join(BENCHMARKS)}, or pass --data FILE"
        )
    if args.temperature == 0 and (samples := samples_of(name, args)) > 1:
        raise EvaluationError(f"temperature 0 gives {samples} equal samples; pass --samples 1 or raise the temperature")
    return load_problems(name, path, None if args.fields is None else names(args.fields))


def make_job(name: str, problems: list[Problem], model: ModelFolder, args: argparse.Namespace, *, sha256: str) -> Job:
    """The job with the settings that its samples depend on: all of the file's prompts, not only the first N."""
    template = prompt_template(args.template)
    options = {"template": template, "system": args.system, "chat": not args.no_chat}
    prompts = []
    for problem in problems:
        try:
            prompts.append(render(problem, tokenizer=model.tokenizer, **options))
        except TaskError as error:
            if error.__cause__ is None:  # no template at all
                raise
            raise EvaluationError(
                f"the chat template of {model.path} fails on problem {problem.id!r} of {name} "
                f"({' '.join(str(error.__cause__).split())}); "
                + ("leave out --system, which some refuse, or " if args.system is not None else "mend it, or ")
                + "pass --no-chat"
            ) from error
    ids = [problem.id for problem in problems]
    settings = {
        "benchmark": name,
        "prompts_sha256": hashlib.sha256(json.dumps([ids, prompts]).encode()).hexdigest(),
        "model_sha256": sha256,
        "template": template.text,
        "system": args.system,
        "chat": not args.no_chat,
        "stop_token_ids": stop_tokens(model.tokenizer, chat=not args.no_chat, stop=args.stop),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
        "dtype": args.dtype,
        "seed": args.seed,
    }
    path = args.output / model.label / f"{name}-T{args.temperature:g}.jsonl"
    return Job(name, problems[: args.problems], prompts[: args.problems], samples_of(name, args), settings, path)


def evaluate_model(
    model: ModelFolder, problems: dict[str, list[Problem]], args: argparse.Namespace, generator: Generator
) -> list[Result]:
    """The model's result on each benchmark; the engine starts only if a sample is missing."""
    sha256 = model.sha256()
    jobs = [make_job(name, chosen, model, args, sha256=sha256) for name, chosen in problems.items()]
    prompts = [Prompt(p, text) for job in jobs for p, text in zip(job.problems, job.prompts, strict=True)]
    longest = check_prompt_lengths(prompts, tokenizer=model.tokenizer, context=model.context - 1, max_new_tokens=0)
    if longest + args.max_tokens > model.context:
        raise EvaluationError(
            f"the longest prompt of {longest} tokens and --max-tokens {args.max_tokens} exceed the context of "
            f"{model.context} of {model.label}; pass --max-tokens {model.context - longest} or less"
        )
    results = []
    with ExitStack() as stack:
        pool = stack.enter_context(
            GraderPool(workers=min(8, os.cpu_count() or 1), extractor=args.extractor, deadline_s=args.deadline)
        )
        for job in jobs:
            try:
                for problem in job.problems:
                    check_question(args.extractor, question(problem))
            except ValueError as error:  # before hours of sampling, not after
                raise EvaluationError(f"{job.benchmark} cannot be graded: {error}") from error
        started: list[Generate] = []

        def generate() -> Generate:
            if not started:
                length = longest + args.max_tokens
                started.append(stack.enter_context(generator(model.path, max_model_len=length, args=args)))
            return started[0]

        for job in jobs:
            file = SampleFile(job.path, job.settings)
            stack.callback(file.close)
            fill(job, file, generate, seed=args.seed, title=f"{model.label} {job.benchmark}")
            result, grades = score(job, file.samples, pool)
            keep(job, result, grades)
            results.append(result)
    return results


def summary(label: str, result: Result) -> str:
    """One line about the samples behind a score: what a low score may come from."""
    return (
        f"{label} {result.benchmark}: {result.problems} problems x {result.samples}, {result.tokens:.0f} tokens on "
        f"average, {result.truncated:.1%} cut at --max-tokens, {result.unanswered:.1%} without an answer, "
        f"{result.timeouts} comparisons given up"
    )


def main(argv: Sequence[str] | None = None, *, generator: Generator = vllm_generator) -> int:
    args = parse(argv)
    results: dict[str, list[Result]] = {}
    try:
        problems = {name: benchmark_problems(name, args) for name in args.benchmark}
        models = [ModelFolder(path, trust_remote_code=args.trust_remote_code) for path in args.model]
        if len({model.label for model in models}) < len(models):
            raise EvaluationError(f"models need different names, not {', '.join(m.label for m in models)}; rename one")
        for model in models:
            results[model.label] = evaluate_model(model, problems, args, generator)
    except (EvaluationError, PrepareError, TaskError, GraderError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"evaluate: stopped; what is finished is kept in {args.output}; call again to go on", file=sys.stderr)
        return 130
    for label, row in results.items():
        for result in row:
            print(summary(label, result))
    text = table(results, paper=args.paper)
    (args.output / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\nsamples, grades and this table: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
