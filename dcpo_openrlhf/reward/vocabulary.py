"""The words and commands that the grammar knows."""


def names(text: str) -> frozenset[str]:
    """The set of the names in the text."""
    return frozenset(text.split())


FUNCTIONS = names(
    """
    sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsinh arccosh arctanh
    asin acos atan ln log lg exp sqrt abs
    """
)
STANDING = names(
    """
    int iint oint sum prod lim limsup liminf gcd lcm max min sup inf det mod bmod pmod argmax argmin
    floor ceil Re Im lfloor rfloor lceil rceil
    """
)
"""What is to be worked out: left standing, it is no answer unless the gold has it too."""
GREEK = names(
    """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau
    upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell
    """
)
CONNECTIVES = frozenset({"or", "and"})
HEDGES = names(
    """
    or not no nor is are isn't aren't was be if when where unless except but and more less fewer
    greater smaller most least than over under above below about around approximately roughly nearly
    almost exactly maybe perhaps possibly probably wrong correct incorrect false true never
    always either neither both none all any every each other another instead of to from by with
    without half quarter third twice thrice double triple times plus minus divided multiplied
    squared cubed factorial mod modulo base point power root log only off away out at on
    as into answer guess unknown undefined unclear unsure impossible one two three four five six
    seven eight nine ten eleven twelve zero first last next even odd prime positive
    negative maximum minimum  remainder rounded will would could should
    might may can cannot can't don't know think sure we i you it that this these those which what
    who why how halves thirds quarters fourths fifths sixths sevenths eighths ninths tenths hundredths
    thousandths millionths hundreds thousands millions billions trillions dozens bn mn mil
    """
)
"""Words that make more, less or nothing of a number: none of them stands in a unit or the name of a counted thing."""
MULTIPLES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
DIRECTIONS = names(
    """
    north south east west northeast northwest southeast southwest up down left right clockwise
    counterclockwise anticlockwise upward upwards downward downwards forward backward inward outward
    """
)
