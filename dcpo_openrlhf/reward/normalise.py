r"""One spelling for each answer: typography becomes plain LaTeX, words of text become \w<word>."""

import re
import unicodedata

from dcpo_openrlhf.reward.vocabulary import names

_SUPER = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_SUB = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", "0123456789+-=()", strict=True))
_SCRIPTS = (
    (re.compile(f"[{''.join(_SUPER)}]+"), "^", _SUPER),
    (re.compile(f"[{''.join(_SUB)}]+"), "_", _SUB),
)
_GREEK_IN_ORDER = """
alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho . sigma tau
upsilon phi chi psi omega
"""
_GREEK = _GREEK_IN_ORDER.split()
_SYMBOLS = {
    **{chr(0x3B1 + i): f"\\{name} " for i, name in enumerate(_GREEK) if name != "."},
    **{chr(0x391 + i): f"\\{name.capitalize()} " for i, name in enumerate(_GREEK) if name != "."},
    **dict.fromkeys("−–—－‐‑‒﹣", "-"),
    **dict.fromkeys("×✕", "\\times "),
    **dict.fromkeys("·⋅∙•", "\\cdot "),
    **dict.fromkeys("′’ʹ", "'"),
    **dict.fromkeys("″”", "''"),
    **{"÷": "/", "∕": "/", "⁄": "/", "±": "\\pm ", "∓": "\\mp ", "∞": "\\infty ", "°": "^{\\circ}", "º": "^{\\circ}"},
    **{"≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "≡": "\\equiv "},
    **{
        "∪": "\\cup ",
        "∩": "\\cap ",
        "∈": "\\in ",
        "∅": "\\emptyset ",
        "∖": "\\setminus ",
        "→": "\\to ",
        "∠": "\\angle ",
    },
    **{
        "ℝ": "\\mathbb{R}",
        "ℤ": "\\mathbb{Z}",
        "ℕ": "\\mathbb{N}",
        "ℚ": "\\mathbb{Q}",
        "ℂ": "\\mathbb{C}",
        "△": "\\triangle ",
    },
    **{
        "…": "\\ldots ",
        "⋯": "\\ldots ",
        "。": ".",
        "、": ",",
        "⟨": "\\langle ",
        "⟩": "\\rangle ",
        "％": "\\%",
        "∨": "\\lor ",
    },
    **{
        "ℏ": "\\hbar ",
        "µ": "\\mu ",
        "ϕ": "\\phi ",
        "ϵ": "\\epsilon ",
        "⌊": "\\lfloor ",
        "⌋": "\\rfloor ",
        "￥": "¥",
        "￡": "£",
    },
    **{
        "【": "[",
        "】": "]",
        "∶": ":",
        "｜": "|",
        "√": "\\sqrt ",
        "∛": "\\sqrt[3] ",
        "∜": "\\sqrt[4] ",
        "∂": "\\partial ",
    },
    **dict.fromkeys("\u201c\u201d\u201e", ""),
    **{"\u00c5": "\\AA ", "\u212b": "\\AA ", "\u2126": "\\Omega "},
}
_SAME = {  # commands that say the same
    **dict.fromkeys(names("dfrac tfrac cfrac nicefrac sfrac xfrac"), "frac"),
    **dict.fromkeys(names("dbinom tbinom"), "binom"),
    **{"leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">"},
    **{"varnothing": "emptyset", "varepsilon": "epsilon", "vartheta": "theta", "varphi": "phi", "dots": "ldots"},
    **{"cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots", "vee": "lor", "rightarrow": "to", "longrightarrow": "to"},
    **{"lbrace": "{", "rbrace": "}", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "ast": "*", "div": "/"},
    **{"degree": "circ", "bar": "overline", "colon": ":", "lbrack": "[", "rbrack": "]", "simeq": "approx"},
    **{"longleftrightarrow": "leftrightarrow", "backslash": "setminus", "smallsetminus": "setminus", "dot": "dot"},
    **{"arccosine": "arccos", "arcsine": "arcsin", "exponential": "exp", "vec": "overrightarrow", "thicksim": "sim"},
    **dict.fromkeys(names("smallmatrix psmallmatrix bsmallmatrix matrix bmatrix array"), "pmatrix"),
}
_TO_CHARACTER = set("<>|*/:[]")
_DROPPED = names(
    """
    left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle
    scriptstyle limits nolimits rm bf it mathstrut strut boldmath normalsize large hfill middle
    hline
    """
)
_SPACES = {
    ",",
    ";",
    ":",
    " ",
    ">",
    "~",
    "quad",
    "qquad",
    "enspace",
    "thinspace",
    "medspace",
    "thickspace",
    "space",
    "!",
}
_FONTS = "bm|boldsymbol|mathbf|mathit|mathsf|mathtt|mathnormal|pmb|ensuremath|underline|fbox|boxed"
_TEXTS = (
    "text|textbf|textit|textrm|textsf|texttt|textnormal|textup|mathrm|mbox|hbox|operatorname|operatorname\\*|emph|rm"
)
_WRAPPED = re.compile(rf"\\(?:(?P<font>{_FONTS})|(?P<text>{_TEXTS}))\s*\{{(?P<inside>(?:[^{{}}]|\{{[^{{}}]*\}})*)\}}")
_WRAPPER = re.compile(rf"\\(?:{_FONTS}|{_TEXTS})\s*(?=\{{)")
_MARKABLE = re.compile(r"\\w<[^>]*>|\\[A-Za-z]+|([A-Za-z][A-Za-z'\-]*[A-Za-z])")
_COMMAND = re.compile(r"\\([a-zA-Z]+)\s*|\\(.)", re.DOTALL)
_RUN = re.compile(r"[A-Za-z][A-Za-z\-]*[A-Za-z]")
_MIXED = re.compile(r"(?<=[0-9])([½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒])|([½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒])")
_THIN = r"\{\s*(?:,|\\,|\\;|\\ )\s*\}|,\s*\\!|\\!\s*,|\\text\s*\{,\}|\\[,;:]|\\thinspace\s*|[\u2009\u202f\uff0c]"
_EXPLICIT_THOUSANDS = re.compile(rf"(?<=[0-9])(?:{_THIN})\s*(?=[0-9]{{3}}(?![0-9]))")
_FRENCH = re.compile(r"(?<![\w)}\]])\]([^\[\]()]*,[^\[\]()]*)([\[\]])")
_FRENCH_RIGHT = re.compile(r"\[([^\[\]()]*,[^\[\]()]*)\[")
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


def _unicode(text: str) -> str:
    """Full-width, super- and subscript, fractions, roots and signs in LaTeX."""
    for pattern, mark, table in _SCRIPTS:
        text = pattern.sub(lambda m, mark=mark, table=table: f"{mark}{{{''.join(table[c] for c in m[0])}}}", text)

    def fraction(match: re.Match[str]) -> str:
        top, _, bottom = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
        return f"\\frac{{{top}}}{{{bottom}}}"

    text = _MIXED.sub(fraction, text)
    text = re.sub(r"√\s*([0-9.]+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = "".join(_SYMBOLS.get(c, c) for c in text.translate(_HALF_WIDTH))
    return "".join(
        " " if c.isspace() or unicodedata.category(c) == "Zs" else c for c in text if c not in "\u200b\ufeff\u2060"
    )


def _unwrap(match: re.Match[str]) -> str:
    r"""The inside of \mathbf{..} as it is; that of \text{..} with its words marked."""
    inside = match["inside"]
    if match["font"]:
        return f" {inside} "
    before = match.string[: match.start()].rstrip(" ~,\\;")[-1:]
    if (
        before.isdigit() or before in (")", "}", ">") or match.string[: match.start()].rstrip().endswith("\\mu")
    ):  # a unit of one letter
        inside = re.sub(r"(?<![A-Za-z\\<])([msghNJWVKLCFAT])(?![A-Za-z>.])", r" \\w<\1> ", inside)
    if "\\w<" in inside or _RUN.search(inside):
        return f" {_mark(inside)} "
    # \circ\text{C} must not become \circC
    return (
        f" {inside}" if re.search(r"\\[A-Za-z]+$", match.string[: match.start()]) and inside[:1].isalpha() else inside
    )


def _mark(text: str) -> str:
    """The text with its words marked, but for commands and what is marked already."""
    return _MARKABLE.sub(lambda m: f" \\w<{m[1]}> " if m[1] else m[0], text)


def _command(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name in _SPACES:
        return "" if name == "!" else " "
    if name in _DROPPED:
        return ""
    name = _SAME.get(name, name)
    if name in _TO_CHARACTER:
        return name
    return f"\\{name} " if name.isalpha() else f"\\{name}"


def normalise(text: str) -> str:
    r"""The same answer in one spelling: `\dfrac12`, `½` and `\nicefrac{1}{2}` are `\frac12`; \text{cm} is `\w<cm>`.

    Linear in its length. Four levels of wrappers are opened; of deeper ones, only the braces stay.
    """
    text = _EXPLICIT_THOUSANDS.sub("", text)
    text = _unicode(text).replace("~", " ")
    text = _FRENCH.sub(lambda m: f"({m[1]}{')' if m[2] == '[' else ']'}", text)
    text = _FRENCH_RIGHT.sub(r"[\1)", text)
    text = re.sub(r"\\\\(?:\[[^\]]*\])?", r"\\newrow ", text)
    text = re.sub(r"\\begin\s*\{array\}\s*\{[^}]*\}", r"\\begin{array}", text)
    text = re.sub(r"\\(begin|end)\s*\{([a-z]+)\*?\}", lambda m: f"\\{m[1]}<{_SAME.get(m[2], m[2])}>", text)
    text = re.sub(r"(?<!\\)\$(?![0-9.])|\\[()\[\]]|(?<!\\)\$(?=[^$]*[^\\$]\$)|(?<=[0-9.])\$$", " ", text)
    text = re.sub(r"\\text\s*\{\s*\\?\$\s*\}|\\\$|\$", " \\\\usd ", text)
    for _ in range(4):
        text = _WRAPPED.sub(_unwrap, text)
    text = _WRAPPER.sub("", text)
    text = _EXPLICIT_THOUSANDS.sub("", text)
    text = re.sub(r"\\mu\s*\\w\s*<([a-zA-Z]+)>", r"\\w<mu\1>", text)
    text = re.sub(r"\\AA(?![a-z])|\\(?:mathring|r)\s*\{\s*A\s*\}", r" \\w<angstrom> ", text)
    text = re.sub(r"(?<!\\)%", r"\\%", text).replace("{:}", ":")
    text = re.sub(r"\\not\s*=", r"\\ne ", re.sub(r"\\([RZNQC])(?![A-Za-z])", r"\\mathbb{\1}", text))
    text = _COMMAND.sub(_command, text)
    text = re.sub(r"\.\.\.+", r"\\ldots ", text).replace("**", "^")
    text = re.sub(r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac {\1}{\2}", text)
    text = re.sub(r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)", r"\\times ", text)
    text = re.sub(r"&\s*\\w\s*<(?:if|for|when)>", "&", re.sub(r",\s*(?=&|\\newrow|\\end)", "", text))
    text = re.sub(r"\^\s*\\prime\b|\^\s*\{\s*((?:\\prime\s*)+)\}", lambda m: "'" * max(1, m[0].count("prime")), text)
    text = re.sub(r"\^\s*(\\circ\b|\{\s*\\circ\s*\})", r"\\deg ", text)
    text = re.sub(r"\s+", " ", text).strip()
    return _trailing(text)


def _trailing(text: str) -> str:
    """Without punctuation at the end, and without braces or parentheses around the whole."""
    while True:
        before = text
        text = re.sub(r"(?:(?<!\\)[\s.,;:]|\\newrow|(?<!\\)\\)+$", "", text) if not text.endswith("\\ldots") else text
        if (
            text.startswith("{")
            and text.endswith("}")
            and not text.endswith("\\}")
            and "," not in text
            and _encloses(text)
        ):
            text = text[1:-1].strip()
        if text == before:
            return text


def _encloses(text: str) -> bool:
    depth = 0
    for i, c in enumerate(text):
        if c in "{}" and (i == 0 or text[i - 1] != "\\"):
            depth += 1 if c == "{" else -1
            if depth <= 0 and i < len(text) - 1:
                return False
    return depth == 0


def spoken(text: str) -> str:
    r"""A normalised text without its marks, for a person's patterns: `12 \w<cm>` is `12 cm`."""
    return re.sub(r"\s+", " ", re.sub(r"\\w\s*<([^>]*)>", r"\1", text)).strip()
