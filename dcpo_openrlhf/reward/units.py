"""Units of measure, currencies and counted things behind a number: their factor and their dimensions, exact."""

from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from dcpo_openrlhf.reward.vocabulary import DIRECTIONS, names

Dimensions = tuple[tuple[str, Fraction], ...]
"""(base, power), sorted by base: m/s is (("length", 1), ("time", -1))."""


class Unit(NamedTuple):
    factor: Fraction
    pi: int
    """The power of pi in the factor: 1 for degrees."""
    dims: Dimensions


_TABLE: dict[str, tuple[Fraction, int, dict[str, int]]] = {}


def _define(spellings: str, factor: Fraction | int | str, pi: int = 0, **dims: int) -> None:
    for name in spellings.split():
        _TABLE[name] = (Fraction(factor), pi, dims)


for prefix, power in {"": 0, "k": 3, "c": -2, "m": -3, "d": -1, "μ": -6, "mu": -6, "n": -9, "p": -12, "f": -15}.items():
    _scale = Fraction(10) ** power
    _define(f"{prefix}m", _scale, length=1)
    if prefix not in ("d", "c", "p", "f"):
        _define(f"{prefix}s", _scale, time=1)
    if prefix != "p":
        _define(f"{prefix}g", _scale / 1000, mass=1)
    if prefix not in ("p", "f"):
        _define(f"{prefix}L {prefix}l", _scale / 1000, length=3)
for prefix, power in {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "m": -3, "μ": -6, "n": -9}.items():
    _scale = Fraction(10) ** power
    _define(f"{prefix}Hz", _scale, time=-1)
    _define(f"{prefix}N", _scale, mass=1, length=1, time=-2)
    _define(f"{prefix}J", _scale, mass=1, length=2, time=-2)
    _define(f"{prefix}W", _scale, mass=1, length=2, time=-3)
    _define(f"{prefix}Pa", _scale, mass=1, length=-1, time=-2)
    _define(f"{prefix}V", _scale, mass=1, length=2, time=-3, current=-1)
    _define(f"{prefix}A", _scale, current=1)
    _define(f"{prefix}eV", _scale * Fraction("1.602176634e-19"), mass=1, length=2, time=-2)
    _define(f"{prefix}pc", _scale * Fraction("3.0856775814913673e16"), length=1)
    _define(f"{prefix}K", _scale, temperature=1)
    _define(f"{prefix}mol", _scale, amount=1)
for spellings, scale, base in (
    ("meter metre", 1, "length"),
    ("kilometer kilometre", 1000, "length"),
    ("centimeter centimetre", "1/100", "length"),
    ("millimeter millimetre", "1/1000", "length"),
    ("micrometer micrometre micron", "1e-6", "length"),
    ("nanometer nanometre", "1e-9", "length"),
    ("decimeter decimetre", "1/10", "length"),
    ("angstrom", "1e-10", "length"),
    ("inch inche in", "0.0254", "length"),
    ("foot feet ft", "0.3048", "length"),
    ("yard yd", "0.9144", "length"),
    ("mile mi", "1609.344", "length"),
    ("second sec", 1, "time"),
    ("millisecond", "1/1000", "time"),
    ("minute min", 60, "time"),
    ("hour hr h", 3600, "time"),
    ("day", 86400, "time"),
    ("week", 604800, "time"),
    ("month", "31556952/12", "time"),
    ("year yr", 31556952, "time"),
    ("gram gramme", "1/1000", "mass"),
    ("kilogram kilo", 1, "mass"),
    ("milligram", "1e-6", "mass"),
    ("tonne", 1000, "mass"),
    ("pound lb", "0.45359237", "mass"),
    ("ounce oz", "0.028349523125", "mass"),
    ("dollar usd USD buck", 1, "dollar"),
    ("cent ¢", "1/100", "dollar"),
    ("penny pennie", "1/100", "dollar"),
    ("euro € EUR", 1, "euro"),
    ("£ GBP", 1, "sterling"),
    ("¥ yen JPY yuan CNY RMB", 1, "yen"),
    ("₹ rupee Rs INR", 1, "rupee"),
    ("kelvin", 1, "temperature"),
    ("mole", 1, "amount"),
    ("ampere amp", 1, "current"),
    ("bit", 1, "information"),
    ("byte", 8, "information"),
):
    _define(spellings, scale, **{base: 1})
_define("degree deg", "1/180", 1, angle=1)
_define("arcmin arcminute", "1/10800", 1, angle=1)
_define("arcsec arcsecond", "1/648000", 1, angle=1)
_define("radian rad", 1, angle=1)
_define("% percent percentage", "1/100", percent=1)
_define("liter litre", "1/1000", length=3)
_define("milliliter millilitre cc", "1e-6", length=3)
_define("hectare ha", 10000, length=2)
_define("acre", "4046.8564224", length=2)
_define("mph", Fraction("1609.344") / 3600, length=1, time=-1)
_define("kmh kph kmph", Fraction(1000, 3600), length=1, time=-1)
_define("newton", 1, mass=1, length=1, time=-2)
_define("dyne dyn", "1e-5", mass=1, length=1, time=-2)
_define("joule", 1, mass=1, length=2, time=-2)
_define("kilojoule", 1000, mass=1, length=2, time=-2)
_define("erg", "1e-7", mass=1, length=2, time=-2)
_define("calorie cal", "4.184", mass=1, length=2, time=-2)
_define("watt", 1, mass=1, length=2, time=-3)
_define("kilowatt", 1000, mass=1, length=2, time=-3)
_define("volt", 1, mass=1, length=2, time=-3, current=-1)
_define("hertz", 1, time=-1)
_define("pascal", 1, mass=1, length=-1, time=-2)
_define("coulomb C", 1, current=1, time=1)
_define("ohm", 1, mass=1, length=2, time=-3, current=-2)
_define("tesla T", 1, mass=1, time=-2, current=-1)
_define("gauss G", "1e-4", mass=1, time=-2, current=-1)

_PRODUCTS = names(
    "in mu ha ns ng nl fs fg fm pm pg dg dm ms mm mA mV mK mN mW mJ mT nA nV nK nN nW nJ kN kV kA kK TV TA TN"
)
GLUED = frozenset(name for name in _TABLE if len(name) > 1 and name.isascii()) - (_PRODUCTS - {"mm", "dm"})
"""Names that are units right behind a number even without \\text: 5cm. Single letters are variables."""
LETTERS = frozenset("m s g h N J W V K L C T")
"""Letters that are units behind a number and a space where nothing else can be meant: 12 m/s for 12."""


def lookup(word: str) -> Unit | None:
    """The unit of a name in singular or plural, in any case where it is a whole word."""
    for name in (
        word,
        word.removesuffix("s"),
        word.lower(),
        word.lower().removesuffix("s"),
        word.lower().removesuffix("es"),
    ):
        if name in _TABLE and (name == word or len(name) > 2 or name + "s" == word):
            factor, pi, dims = _TABLE[name]
            return Unit(factor, pi, _sorted(dims))
    return None


def thing(words: list[str]) -> Unit:
    """A counted thing as a unit of its own: apples, ordered pairs."""
    return Unit(Fraction(1), 0, (("thing " + " ".join(_singular(w.lower()) for w in words), Fraction(1)),))


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _sorted(dims: dict[str, int] | dict[str, Fraction]) -> Dimensions:
    return tuple(sorted((base, Fraction(power)) for base, power in dims.items() if power))


def product(units: list[tuple[Unit, int]]) -> Unit:
    """The product of units, each to its power."""
    factor, pi, dims = Fraction(1), 0, Counter[str]()
    for unit, power in units:
        factor *= unit.factor**power
        pi += unit.pi * power
        for base, exponent in unit.dims:
            dims[base] += exponent * power  # type: ignore
    return Unit(factor, pi, _sorted(dims))


def is_measured(dims: Dimensions) -> bool:
    """Whether all of it is measure or money, and nothing a counted thing."""
    return not any(base.startswith("thing ") for base, _ in dims)


def has_direction(dims: Dimensions) -> bool:
    return any(word in DIRECTIONS for base, _ in dims if base.startswith("thing ") for word in base.split()[1:])
