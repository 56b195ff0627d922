"""Make a small model: qwen2, a few million parameters, a tokenizer of its own, taught until it is right now and then.

python -m tools.reproduce.small_model [sums | signs] [--output DIR]

Minutes on two cores. The same seed gives the same weights on the same kind of machine; the folder also holds the
problems (train.jsonl, heldout.jsonl) and what was measured (small_model.json).
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tools.reproduce.tasks import SIGNS, SUMS, Task

PAD, END = "<pad>", "<end>"
HELD_OUT = 400
RECORD = "small_model.json"
IGNORED = -100
"""Label of tokens that are not learned, by transformers' convention."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a model is made and taught; the values are those for Sums."""

    seed: int = 1
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 512
    positions: int = 128
    batch: int = 128
    learning_rate: float = 3e-3
    warm_up: int = 50
    look_every: int = 50
    """Updates between two measurements."""
    accuracy: float = 0.25
    """Sampled accuracy at which it has learned enough; the band asked for is 0.2 to 0.4."""
    updates: int = 1500
    """At most."""
    threads: int = 2


MODELS: dict[str, tuple[Task, Setting]] = {
    "sums": (SUMS, Setting()),
    "signs": (SIGNS, Setting(batch=96, learning_rate=2e-3)),
}
"""The grid's model, and that of Theorem 3.1."""


def default_output(name: str) -> Path:
    """The user's cache folder for this model."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dcpo_openrlhf" / f"reproduce-{name}"


def make_tokenizer(task: Task) -> Any:
    """Words between spaces are tokens: the task's vocabulary, a pad token, an end token."""
    vocabulary = {word: i for i, word in enumerate([PAD, END, *task.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # for its spaces between words alone
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def make_model(setting: Setting, tokenizer: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(setting.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        intermediate_size=setting.ffn,
        max_position_embeddings=setting.positions,
        tie_word_embeddings=True,
        use_sliding_window=False,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same network as a llama with attention biases, of which the output's is 0.

    transformers reads every qwen2 folder with Qwen2's own tokenizer, whatever the folder says.
    """
    c = model.config
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shared += ("intermediate_size", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "rope_parameters")
    shared += ("bos_token_id", "eos_token_id", "pad_token_id")
    llama = LlamaForCausalLM(LlamaConfig(attention_bias=True, **{name: getattr(c, name) for name in shared}))
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if name.endswith("o_proj.bias"):
                parameter.zero_()
    llama.load_state_dict(llama.state_dict() | model.state_dict())
    llama.generation_config = model.generation_config
    return llama


def split(task: Task) -> tuple[list[str], list[str]]:
    """(training problems, held-out ones)."""
    problems = task.problems()
    return problems[HELD_OUT:], problems[:HELD_OUT]


def batch_of(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """(prompt tokens, answer tokens) padded on the right; answers alone are learned."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), IGNORED)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, (prompt, answer) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(answer)
        tokens[i, :end] = torch.tensor(prompt + answer)
        labels[i, start:end] = torch.tensor(answer)
        mask[i, :end] = 1
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, mask, entropy) [rows, time] of one response to each prompt at T; the end token counts, what follows not.

    Entropy [nats/token] is of the distribution that was drawn from.
    """
    encoded = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    model.eval()
    out = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        output_scores=True,
        return_dict_in_generate=True,
    )
    model.train()
    tokens = out.sequences[:, encoded["input_ids"].shape[1] :]
    log_pi = torch.stack(out.scores, 1).log_softmax(-1)
    entropy = -(log_pi.exp() * log_pi.clamp_min(-1e4)).sum(-1)
    ended = (tokens == tokenizer.eos_token_id).long()
    return tokens, (ended.cumsum(1) - ended) == 0, entropy


def measure(model: Any, tokenizer: Any, task: Task, problems: Sequence[str]) -> dict[str, float]:
    """Accuracy, entropy [nats/token] and length of samples at T = 1, one a problem."""
    tokens, mask, entropy = sample(model, tokenizer, problems, new_tokens=task.new_tokens)
    count = 0
    for problem, row, counts in zip(problems, tokens, mask, strict=True):
        answer = row[counts].tolist()
        ended = answer[-1] == tokenizer.eos_token_id
        count += ended and task.right(problem, tokenizer.decode(answer, skip_special_tokens=True))
    return {
        "accuracy": count / len(problems),
        "entropy": float(entropy[mask].mean()),
        "tokens": float(mask.sum(1).float().mean()),
    }


def teach(model: Any, tokenizer: Any, task: Task, setting: Setting) -> dict[str, float]:
    """Supervised updates on the task's answers, until samples are right often enough; the last measurement."""
    train, heldout = split(task)
    rng, begin, found = random.Random(setting.seed), time.monotonic(), {}
    pad, end = int(tokenizer.pad_token_id or 0), tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), setting.learning_rate, (0.9, 0.95), weight_decay=0.01)
    for update in range(1, setting.updates + 1):
        rows = []
        for problem in rng.choices(train, k=setting.batch):
            answer = tokenizer.encode(task.trace(problem, rng))
            rows.append((tokenizer.encode(problem), [*answer, end]))
        optimizer.param_groups[0]["lr"] = setting.learning_rate * min(1.0, update / setting.warm_up)
        loss = model(**batch_of(rows, pad)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if update % setting.look_every == 0:
            found = {"update": update, "loss": float(loss.detach()), **measure(model, tokenizer, task, heldout)}
            said = "  ".join(f"{name} {value:.3g}" for name, value in found.items())
            print(f"{said}  {time.monotonic() - begin:.0f} s", flush=True)
            if found["accuracy"] >= setting.accuracy:
                break
    return found | {"seconds": time.monotonic() - begin}


def write_problems(task: Task, folder: Path) -> None:
    """train.jsonl and heldout.jsonl in the form that a recipe's task.kind = jsonl reads."""
    for name, problems in zip(("train", "heldout"), split(task), strict=True):
        rows = [{"id": p, "problem": p, "answer": "-", "source": type(task).__name__.lower()} for p in problems]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(output: Path, setting: Setting, task: Task) -> dict[str, float]:
    """The folder, which is there whole or not at all; what was measured."""
    torch.set_num_threads(setting.threads)
    tokenizer = make_tokenizer(task)
    model = make_model(setting, tokenizer)
    found = teach(model, tokenizer, task, setting)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        folder = Path(temporary) / "model"
        as_llama(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_problems(task, folder)
        parameters = sum(p.numel() for p in model.parameters())
        record = {
            "setting": asdict(setting),
            "task": asdict(task),
            "parameters": parameters,
            "measured": found,
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(output, ignore_errors=True)
        folder.rename(output)
    return found


def is_made(folder: Path, setting: Setting, task: Task) -> bool:
    """Does the folder hold the model of this setting and task?"""
    file = folder / RECORD
    if not file.is_file():
        return False
    record = json.loads(file.read_text())
    return record["setting"] == asdict(setting) and record["task"] == asdict(task)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.reproduce.small_model", description="Make the small model of docs/results/."
    )
    parser.add_argument("task", nargs="?", choices=MODELS, default="sums", help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: the user's cache folder")
    parser.add_argument("--seed", type=int, default=Setting.seed)
    args = parser.parse_args(argv)
    task, setting = MODELS[args.task]
    output = args.output or default_output(args.task)
    found = make(output, replace(setting, seed=args.seed), task)
    print(f"{output}: right in {found['accuracy']:.1%} of samples, {found['entropy']:.2f} nats/token")
    if found["accuracy"] < Setting.accuracy or found["entropy"] < 1.0:
        print("small_model: not what the grid asks for: 20 to 40 % and more than 1 nat/token", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
