"""Pairs of answers made by a rule: the same answer said otherwise earns 1, one with one thing changed earns 0."""

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dcpo_openrlhf.reward.compare import settle, symbolic_equal
from dcpo_openrlhf.reward.vocabulary import FUNCTIONS, GREEK, STANDING
from tests.reward.test_kinds import FULL_WIDTH, earned

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
WHOLE = st.integers(-(10**12), 10**12)
COUNT = st.integers(2, 10**6)


def grouped(n: int, mark: str) -> str:
    return f"{n:,}".replace(",", mark)


DRESSES = (
    lambda n: str(n).translate(FULL_WIDTH),
    lambda n: grouped(n, ","),
    lambda n: grouped(n, "{,}"),
    lambda n: grouped(n, ",\\!"),
    lambda n: grouped(n, "\\,"),
    lambda n: grouped(n, "\u2009"),
    lambda n: grouped(n, "~"),
    lambda n: f"\\text{{{n}}}",
    lambda n: f"\\bm{{{n}}}.",
    lambda n: f"\\left({n}\\right)",
    lambda n: f"${n}$",
    lambda n: f"x={n}",
    lambda n: f"{n}.00",
    lambda n: f"\\frac{{{3 * n}}}{{3}}",
    lambda n: str(n).replace("-", "\u2212") + "\u3002",
)


@EXAMPLES
@given(WHOLE, WHOLE, st.sampled_from(DRESSES))
def test_an_integer_in_any_dress_is_itself_and_no_other(n, other, dress):
    assert earned(dress(n), str(n)) == 1.0
    for wrong in {n + 1, -n, n * 10, other} - {n}:
        assert earned(dress(wrong), str(n)) == 0.0


HEDGES = (
    "or {}",
    "{} or more",
    "{} is wrong",
    "not {}",
    "about {}",
    "{} if x>0",
    "at most {}",
    "{} and {}",
    "neither {}",
    "{} million",
)


@EXAMPLES
@given(COUNT, COUNT, st.sampled_from(HEDGES))
def test_hedges_chains_and_seconds_earn_nothing(n, other, hedge):
    assume(n != other)
    for answer in (
        hedge.format(n, other),
        f"\\text{{{hedge.format(n, other)}}}",
        f"{n}={other}",
        f"x={other}={n}",
        f"{n};{other}",
    ):
        assert earned(answer, str(n)) == 0.0
    for answer in (
        f"{n}}}{{{other}",
        f"{n} {other}",
        f"{n}_{{7}}",
        f"{n}\\pm{other}",
        f"{n}\\pmod{{{other}}}",
        f"{n}\\ldots",
    ):
        assert earned(answer, str(n)) == (1.0 if answer == f"{n} {other}" and f"{n}{other}" == str(n) else 0.0)


@EXAMPLES
@given(st.integers(1, 400), st.integers(2, 60), st.sampled_from(["\\frac", "\\dfrac", "\\tfrac", "\\nicefrac"]))
def test_fractions_mixed_and_repeating(p, q, command):
    value, gold = Fraction(p, q), f"\\frac{{{p}}}{{{q}}}"
    same = [f"{command}{{{2 * p}}}{{{2 * q}}}", f"{p}/{q}", f"{p}\u2044{q}", f"\\left({gold}\\right)", repeating(value)]
    wrong = [
        f"{command}{{{p + q}}}{{{q}}}",
        f"{p}/{q + 1}",
        f"{q}.{p}",
        repeating(value + Fraction(1, q)),
        repeating(value)[:-1] + ")1",
    ]
    whole, rest = divmod(value.numerator, value.denominator)
    if whole and rest:
        same += [f"{whole}\\frac{{{rest}}}{{{value.denominator}}}", f"{whole} {rest}/{value.denominator}"]
        wrong += [f"{whole}\\cdot\\frac{{{rest}}}{{{value.denominator}}}", f"{whole + 1} {rest}/{value.denominator}"]
    assert [s for s in same if earned(s, gold) != 1.0] == []
    assert [w for w in wrong if earned(w, gold) != 0.0 and not (p == 1 and w == wrong[2])] == []


def repeating(value: Fraction) -> str:
    """The decimal with its period in parentheses, by long division."""
    whole, rest = divmod(value.numerator, value.denominator)
    digits, seen = "", {}
    while rest not in seen:
        seen[rest] = len(digits)
        digit, rest = divmod(10 * rest, value.denominator)
        digits += str(digit)
    return f"{whole}.{digits[: seen[rest]]}({digits[seen[rest] :]})"


@EXAMPLES
@given(st.integers(101, 999), st.integers(-400, 400))
def test_powers_of_ten_at_every_scale(mantissa, exponent):
    assume(mantissa % 10 and abs(exponent) > 3)
    head = f"{mantissa // 100}.{mantissa % 100:02}"
    gold = f"{head}\\times 10^{{{exponent}}}"
    for right in (
        f"{head}e{exponent}",
        f"{head}\\cdot10^{{{exponent}}}\\text{{ m}}",
        f"{mantissa}\\times 10^{{{exponent - 2}}}",
        f"{head}x10^{exponent}",
    ):
        assert earned(right, gold) == 1.0, right
    for wrong in (
        f"{head}e{exponent + 1}",
        f"{head[:-1]}{(mantissa + 1) % 10}e{exponent}",
        f"-{head}e{exponent}",
        head,
        "0",
        f"10^{{{exponent}}}",
    ):
        assert earned(wrong, gold) == 0.0, wrong


CONVERSIONS = [
    *(("km", "m", 1000), ("m", "cm", 100), ("kg", "g", 1000), ("h", "min", 60), ("hours", "seconds", 3600)),
    *(("ft", "in", 12), ("dollars", "cents", 100), ("m^2", "cm^2", 10**4), ("L", "mL", 1000), ("weeks", "days", 7)),
    ("degrees", "arcminutes", 60),
]


@EXAMPLES
@given(COUNT, st.sampled_from(CONVERSIONS))
def test_units_convert_and_are_not_swapped(n, conversion):
    large, small, factor = conversion

    def said(count: int, unit: str) -> str:
        name, _, power = unit.partition("^")
        return f"{count}\\text{{ {name}}}" + (f"^{power}" if power else "")

    assert earned(said(n * factor, small), said(n, large)) == earned(said(n, large), said(n * factor, small)) == 1.0
    assert earned(str(n), said(n, large)) == earned(said(n, large), str(n)) == 1.0
    for wrong in (
        said(n, small),
        said(n + 1, large),
        said(n * factor + 1, small),
        said(n, "apples"),
        str(n + 1),
        said(n, large + "^3"),
    ):
        assert earned(wrong, said(n, large)) == 0.0, wrong


@EXAMPLES
@given(st.integers(4, 10**9), st.integers(2, 9), st.integers(2, 9))
def test_numerals_keep_their_base(n, base, other):
    digits, left = "", n
    while left:
        left, digit = divmod(left, base)
        digits = str(digit) + digits
    gold = f"{digits}_{base}"
    for right in (f"{digits}_{{{base}}}", f"({digits})_{base}", f"{digits}_{{({base})}}", digits):
        assert earned(right, gold) == 1.0
    for wrong in (
        f"{digits}_{other}" if other != base else "0",
        f"{digits}0_{base}",
        f"{digits[::-1]}1_{base}",
        f"-{digits}_{base}",
    ):
        assert earned(wrong, gold) == 0.0


WORDS = st.text("abcdefghilmnoprstuvy", min_size=4, max_size=9).filter(lambda w: w not in FUNCTIONS | STANDING | GREEK)


@EXAMPLES
@given(WORDS, st.randoms(use_true_random=False))
def test_words_are_no_products_of_letters(word, random):
    for right in (
        word,
        f"\\text{{{word}}}",
        word.capitalize() + ".",
        word.upper(),
        f"\\mathrm{{{word}}}",
        f"\\text{{the {word}}}",
    ):
        assert earned(right, f"\\text{{{word}}}") == 1.0, right
    letters = list(word)
    random.shuffle(letters)
    shuffled = "".join(letters)
    for wrong in (
        shuffled if shuffled != word else "x",
        f"\\text{{not {word}}}",
        word[:-1],
        word + "s",
        "0",
        "".join(sorted(word.swapcase())),
    ):
        assert wrong.lower() == word or earned(wrong, f"\\text{{{word}}}") == 0.0, wrong


@EXAMPLES
@given(st.lists(st.integers(-999, 999), min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_lists_in_any_order_but_whole(members, random):
    gold = ", ".join(map(str, members))
    shuffled = random.sample(members, len(members))
    for right in (
        ", ".join(map(str, shuffled)),
        "\\{" + ",".join(map(str, shuffled)) + "\\}",
        "\\text{ and }".join(map(str, shuffled)),
        "; ".join(f"x={m}" for m in shuffled),
    ):
        assert earned(right, gold) == 1.0, right
    joined = ", ".join(map(str, shuffled[1:]))
    for wrong in (
        joined,
        gold + ", 1000",
        f"{joined}, 1000",
        str(sum(members)),
        " ".join(map(str, members)),
        f"({gold})" if len(members) > 2 else "0",
    ):
        assert earned(wrong, gold) == 0.0, wrong


@EXAMPLES
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=4), st.integers(1, 9))
def test_polynomials_factored_and_changed(roots, scale):
    coefficients = [scale]
    for root in roots:
        coefficients = [a - root * b for a, b in zip([*coefficients, 0], [0, *coefficients], strict=True)]
    expanded = "".join(f"{c:+}x^{{{len(roots) - i}}}" for i, c in enumerate(coefficients))
    factored = f"{scale}" + "".join(f"\\left(x{-root:+}\\right)" if root else "x" for root in roots)
    assert earned(factored, expanded) == earned(expanded, factored) == 1.0
    assert (
        earned(f"{factored}+1", expanded)
        == earned(expanded.replace("x", "y"), expanded)
        == earned(f"-{factored}", expanded)
        == 0.0
    )
    assert earned(f"y={expanded}", f"y={factored}") == earned(f"{expanded}=y", f"y={factored}") == 1.0
    assert earned(f"y={expanded}+x", f"y={factored}") == earned(f"z={expanded}", f"y={factored}") == 0.0


@EXAMPLES
@given(st.integers(-99, 99), st.integers(1, 99), st.booleans(), st.booleans(), st.sampled_from("xtn"))
def test_intervals_and_inequalities(low, width, closed_low, closed_high, name):
    high = low + width
    gold = f"{'[' if closed_low else '('}{low},{high}{']' if closed_high else ')'}"
    below, above = "\\le" if closed_low else "<", "\\leq" if closed_high else "<"
    for right in (f"{low}{below} {name}{above} {high}", f"{name}\\in{gold}", f"\\left{gold[:-1]}\\right{gold[-1]}"):
        assert earned(right, gold) == 1.0, right
    flipped = f"{'(' if closed_low else '['}{low},{high}{gold[-1]}"
    for wrong in (
        flipped,
        f"{low}{below} {name}{above} {high + 1}",
        f"{name}{above} {high}",
        f"{low},{high}",
        f"\\{{{low},{high}\\}}",
        str(low),
    ):
        assert earned(wrong, gold) == 0.0, wrong


@EXAMPLES
@given(st.text("ABCDEFGH", min_size=1, max_size=4).map(lambda s: sorted(set(s))), st.randoms(use_true_random=False))
def test_choices_in_any_dress(letters, random):
    gold, shuffled = ", ".join(letters), random.sample(letters, len(letters))
    for right in (
        ", ".join(shuffled),
        ", ".join(f"({c})" for c in shuffled),
        "\\text{" + " and ".join(shuffled) + "}",
        "".join(letters),
    ):
        assert earned(right, gold) == 1.0, right
    for wrong in (
        gold + ", J",
        "J",
        ", ".join(shuffled[1:]) or "I",
        "not " + gold,
        "+".join(shuffled) if len(letters) > 1 else "J",
    ):
        assert earned(wrong, gold) == 0.0, wrong
    if len(letters) == 1:
        assert earned(f"({gold}) 12", gold) == earned(f"\\text{{{gold}. {'twelve'}}}", gold) == 1.0
        assert earned(f"({gold}) or (J)", gold) == earned("(J) 12", gold) == 0.0


COMMANDS = r"""
\frac \sqrt \{ \} \text{ \pm \in \\ \overline{ km or \begin{pmatrix} \end{pmatrix} \infty \cup ^\circ \% \$ \ldots \log
\mathbb{R} \lfloor \dot
"""
PIECES = st.sampled_from([*"0123456789xyzABe.,;:()[]{}+-/^_!|&=<>' \u00b2\u00bd\u221a\u03c0", *COMMANDS.split()])


@settings(EXAMPLES, max_examples=400)
@given(st.lists(PIECES, max_size=14).map("".join), st.lists(PIECES, min_size=1, max_size=14).map("".join))
def test_any_text_is_graded_and_none_stops_the_grader(found, gold):
    reward = settle(found, gold)
    assert reward in (0.0, 1.0, None)
    assert isinstance(symbolic_equal(gold, found), bool)
    assert not gold.strip() or settle(gold.strip(), gold) == 1.0


@pytest.mark.parametrize(
    "piece", ["(", "{", "-", "1+", "x^", "\\frac", "1,", "$", "\\text{", "2^", "\u00bd", "|", "a'", "100!", "\\{"]
)
def test_long_nonsense_is_wrong(piece):
    answer = (piece * 2000)[: 2000 // len(piece) * len(piece)]
    assert settle(answer, "5") in (0.0, None)
    assert not symbolic_equal("5", answer)
