"""From responses to grades: their texts, what each earns, and the few that the run folder keeps."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcpo_openrlhf.reward.pool import Grade, GraderPool
from dcpo_openrlhf.rollout.tasks import Prompt


def grade_samples(
    samples: Sequence[Any], *, tokenizer: Any, grader: GraderPool, require_end: bool
) -> tuple[list[str], list[Grade]]:
    """The text of each response and what it earns."""
    tokens = [s.sequences[0, 1:][s.action_mask[0].bool()].tolist() for s in samples]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    grades = grader.grade(texts, [s.labels[0] for s in samples])
    if require_end:
        cut_off = [bool(s.truncated[0]) for s in samples]
        grades = [replace(g, reward=0.0, success=0.0) if cut else g for g, cut in zip(grades, cut_off, strict=True)]
    return texts, grades


def keep_samples(
    file: Path, prompts: Sequence[Prompt], texts: Sequence[str], grades: Sequence[Grade], *, group_size: int
) -> None:
    """Write the responses to `file`, one JSON object a line; fewer texts than grades are the first of them."""
    file.parent.mkdir(exist_ok=True)
    with file.open("w") as lines:
        for i, (text, grade) in enumerate(zip(texts, grades, strict=False)):
            problem = prompts[i // group_size].problem
            row = {
                "id": problem.id,
                "answer": problem.answer,
                "response": text,
                "reward": grade.reward,
                "success": grade.success,
                "extracted": grade.extracted,
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
