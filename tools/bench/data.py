"""Seconds and peak memory of reading a million problems as a run reads them at its start, and of a step's prompts then.

Each form is read in a process of its own that has imported what the driver imports: all rows read and checked against
grader and room, ids compared, the first epoch shuffled. Memory is the most that was resident at once (VmHWM), pages of
mapped files included. Prompts are SmolLM2's, in its chat template.

python -m tools.bench.data --output docs/bench/data.md
"""

import argparse
import gzip
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.bench import publish
from tools.smollm2 import ensure_smollm2

TEXT = """A train leaves the station at noon, another follows it two hours later at twice the speed: find how many
marbles are left in the bag when the sum of both numbers is 42. Let $x$ be an integer such that $f(x) = 3x + 7$"""
MEDIAN, LONGEST = 245, 3000
"""Characters of a problem."""
ROOM = 1024
"""Most tokens of a prompt."""
STEP = 128
SCALED = 20_000
"""Prompts that are all written and tokenized, for the seconds that a million would take."""
VERL = "{problem: prompt, answer: reward_model.ground_truth, source: data_source}"
FORMS = {
    # name -> (file, task.fields)
    "JSONL": ("rows.jsonl", "{}"),
    "JSONL in gzip": ("rows.jsonl.gz", "{}"),
    "verl's Parquet, chat messages": ("rows.parquet", VERL),
    "a saved dataset of the same": ("saved", VERL),
}


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Problems of random words."""
    chosen, words = random.Random(0), TEXT.split()
    for i in range(count):
        characters = min(chosen.lognormvariate(math.log(MEDIAN), 0.6), LONGEST)
        text = " ".join(chosen.choices(words, k=max(4, int(characters / 5))))
        yield {"id": f"made-{i}", "problem": text[:LONGEST], "answer": str(i % 1000), "source": "made", "level": i % 5}


def make(folder: Path, count: int) -> None:
    """The same problems in every form."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    with (folder / "rows.jsonl").open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows(count))
    with (folder / "rows.jsonl").open("rb") as lines, gzip.open(folder / "rows.jsonl.gz", "wb", 1) as packed:
        shutil.copyfileobj(lines, packed)
    writer, batch = None, []
    for i, row in enumerate(rows(count)):
        extra = {"split": "train", "index": i, "question": row["problem"]}
        asked = [{"role": "user", "content": row["problem"]}]
        truth = {"style": "rule", "ground_truth": row["answer"]}
        one = {"data_source": "made", "prompt": asked, "ability": "math", "reward_model": truth, "extra_info": extra}
        batch.append(one)
        if len(batch) == 10_000 or i == count - 1:
            table = pyarrow.Table.from_pylist(batch)
            writer = writer or parquet.ParquetWriter(folder / "rows.parquet", table.schema)
            writer.write_table(table)
            batch = []
    assert writer is not None
    writer.close()
    datasets.disable_progress_bars()
    cache = str(folder / "cache")
    datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=cache).save_to_disk(folder / "saved")


def peak_mib() -> float:
    """Most memory that this process had resident at once."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def read(path: Path, fields: str) -> dict[str, float]:
    """In a process that has done nothing else."""
    import yaml

    from dcpo_openrlhf import train_dcpo
    from dcpo_openrlhf.prompts import read_prompts
    from dcpo_openrlhf.recipe.schema import Recipe
    from dcpo_openrlhf.rollout.chat import render
    from dcpo_openrlhf.rollout.room import check_prompt_lengths
    from dcpo_openrlhf.rollout.tasks import prompt_template

    task = {"train": str(path), "fields": yaml.safe_load(fields), "template": "plain"}
    room, template = {"max_prompt_tokens": ROOM}, prompt_template("plain")
    recipe = Recipe.model_validate({"model": {"path": str(ensure_smollm2())}, "task": task, "rollout": room})
    tokenizer = train_dcpo._tokenizer(recipe)
    before, begin, cpu = peak_mib(), time.monotonic(), time.process_time()
    prompts, _ = read_prompts(recipe, tokenizer)
    seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
    begin = time.monotonic()
    prompts.take(STEP)
    step, peak = time.monotonic() - begin, peak_mib()
    some = prompts.take(min(SCALED, len(prompts)))
    begin = time.monotonic()
    again = [prompt._replace(text=render(prompt.problem, tokenizer=tokenizer, template=template)) for prompt in some]
    check_prompt_lengths(again, tokenizer=tokenizer, context=ROOM, max_new_tokens=0)
    every = (time.monotonic() - begin) * len(prompts) / len(some)
    measured = {"seconds": seconds, "cpu": cpu, "before": before, "peak": peak, "step": step, "every": every}
    return measured | {"rows": len(prompts)}


def size(path: Path) -> float:
    """MiB of a file or folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the files are made, and kept; default: a temporary one")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--read", nargs=2, metavar=("FILE", "FIELDS"), help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.read:
        print(json.dumps(read(Path(o.read[0]), o.read[1])))
        return
    ensure_smollm2()
    with tempfile.TemporaryDirectory() as temporary:
        folder = o.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "saved").exists():
            make(folder, o.rows)
        measured = {}
        for form, (name, fields) in FORMS.items():
            command = [sys.executable, "-m", "tools.bench.data", "--read", str(folder / name), fields]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            measured[form] = json.loads(done.stdout) | {"size": size(folder / name)}
    any_form = next(iter(measured.values()))
    lines = [
        f"# Reading {any_form['rows']:,} problems",
        "",
        f"`python -m tools.bench.data --rows {any_form['rows']}`, {os.cpu_count()} cores, "
        f"pyarrow {metadata.version('pyarrow')}, datasets {metadata.version('datasets')}; one reading each. Memory is "
        "the most that was resident at once, of the whole process, mapped files included.",
        "",
        f"| form | MiB on disk | seconds, read and checked | of these on a CPU | peak memory [MiB] | of it before "
        f"reading | seconds for a step's {STEP} prompts |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {form} | {m['size']:.0f} | {m['seconds']:.1f} | {m['cpu']:.1f} | {m['peak']:.0f} | {m['before']:.0f} "
            f"| {m['step']:.2f} |"
            for form, m in measured.items()
        ),
        "",
        f"Texts have a median of about {MEDIAN} characters, at most {LONGEST}. Those that may have more than {ROOM} "
        "tokens, here the room for a prompt, are written in the chat template and tokenized at the start, 1,000 at a "
        "time; the others are seen to fit by their bytes, and written and counted when a step takes them. To do so "
        f"with each at the start would add {any_form['every']:.0f} s (JSONL, measured on {SCALED:,} prompts, scaled).",
    ]
    publish("\n".join(lines) + "\n", o.output)


if __name__ == "__main__":
    main()
