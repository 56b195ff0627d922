"""Are two answers equal? Integers and decimals as numbers, the rest by math-verify."""

import math
import re
from collections.abc import Sequence

from dcpo_openrlhf.reward.extract import EXTRACTORS, LATEX_SPACE, MINUS, Extractor, as_integer

# A final answer is short: anything longer is wrong, not worth a worker's time, and might not fit into a pipe at once.
MAX_ANSWER_CHARS = 2000
_MANTISSA = rf"[+{MINUS}]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_E_NOTATION = re.compile(rf"(?P<mantissa>{_MANTISSA})[eE](?P<exponent>[+-]?[0-9]+)")
_DECIMAL = re.compile(
    rf"(?P<mantissa>{_MANTISSA})(?:(?:[eE]|\s*(?:\\times|\\cdot|\*|\u00d7)\s*10\s*\^)(?P<exponent>[+-]?[0-9]+))?"
)


def as_decimal(text: str) -> float | None:
    r"""The number that the whole text is, as 0.12, 1.2e-5 or 1.2 \times 10^{-5}; None where it is anything else."""
    plain = LATEX_SPACE.sub("", re.sub(r"\{([+-]?[0-9]+)\}", r"\1", text)).strip()
    match = _DECIMAL.fullmatch(plain)
    return None if match is None else float(f"{match['mantissa']}e{match['exponent'] or 0}".replace(MINUS[0], "-"))


def settle(extracted: str | None, answer: str) -> float | None:
    """The reward where it needs no algebra; None where only a symbolic comparison can tell."""
    if not extracted or len(extracted) > MAX_ANSWER_CHARS:
        return 0.0
    if extracted == answer.strip():
        return 1.0
    gold, found = as_integer(answer), as_integer(extracted)
    if gold is not None and found is not None:
        return float(gold == found)
    gold_value, value = as_decimal(answer), as_decimal(extracted)
    if gold_value is None or value is None:
        return None
    # math-verify rounds to six decimals, and so takes 2e-19 for 1e-27. Six significant digits hold at every scale.
    return float(math.isclose(gold_value, value, rel_tol=1e-6 if gold is None else 1e-12))


def check_answers(extractor: str, answers: Sequence[str]) -> None:
    """Raise ValueError for an unknown extractor, or an answer that it cannot meet."""
    if extractor not in EXTRACTORS:
        raise ValueError(f"extractor must be one of {sorted(EXTRACTORS)}, not {extractor!r}")
    for answer in answers:
        if extractor == "last_integer" and as_integer(answer) is None:
            raise ValueError(f'extractor "last_integer" needs integer answers, not {answer!r}; use "boxed"')
        if len(answer) > MAX_ANSWER_CHARS:
            raise ValueError(f"an answer has at most {MAX_ANSWER_CHARS} characters, not {len(answer)}: {answer[:60]!r}")


_BARE_POINT = re.compile(r"(?<=[0-9])\.(?![0-9])")


def _forms(text: str) -> list[str]:
    """The text without a bare point ("D.", "1./3") and, for e-notation, its power of ten: LaTeX reads e33 as e * 33."""
    text = _BARE_POINT.sub("", text.strip()).removesuffix(".")
    match = _E_NOTATION.fullmatch(text)
    return [text] if match is None else [text, f"{match['mantissa']} \\cdot 10^{{{match['exponent']}}}"]


def symbolic_equal(gold: str, found: str) -> bool:
    """Whether math-verify finds the two equal. It has no time limit: only for a process that can be killed.

    Only the box is read ("first_match"): by default math-verify falls back to any number in a text it cannot parse.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list:
        config = [LatexExtractionConfig(boxed_match_priority=0)]
        return parse(f"\\boxed{{{text}}}", config, extraction_mode="first_match", parsing_timeout=None)  # type: ignore

    found_forms = [read(form) for form in _forms(found)]
    golds = [read(form) for form in _forms(gold)]
    return any(verify(g, f, timeout_seconds=None) for g in golds for f in found_forms)


def grade(response: str, answer: str, *, extractor: Extractor) -> float:
    """1.0 if the response's final answer equals `answer`, else 0.0, in this process and without a deadline.

    For tests and single items: a hostile response can hang it or take all memory. Use GraderPool for a policy's output.
    """
    check_answers(extractor, [answer])
    extracted = EXTRACTORS[extractor](response)
    reward = settle(extracted, answer)
    if reward is None and extracted is not None:
        reward = float(symbolic_equal(answer, extracted))
    return reward or 0.0
