"""The benchmark's files hold the same problems in every form."""

from pathlib import Path

import yaml

from dcpo_openrlhf.rollout.data import OWN_NAMES, load
from tools.bench import data


def test_every_form_holds_the_same_problems(tmp_path: Path) -> None:
    data.make(tmp_path, 30)
    made = [(row["problem"], row["answer"]) for row in data.rows(30)]
    for name, fields in data.FORMS.values():
        found = load(tmp_path / name, OWN_NAMES | yaml.safe_load(fields))
        assert [(p.problem, p.answer) for p in found] == made, name
    assert len(set(made)) == 30 and all(10 < len(text) <= data.LONGEST for text, _ in made)
