"""Answers as models write them, in plain ASCII: what the graders of numbers, expressions and grids share.

Every pass here takes time linear in the text: a model may nest, repeat or never close anything.
"""

from __future__ import annotations

import re
import unicodedata

from .boxed import boxed_spans
from .task import chat_answer

MAX_LENGTH = 10_000  # characters of an answer that is read
UNREADABLE = "\x00"  # stands for what has no plain form: roots, unknown commands, malformed numbers

_SEARCHED = 100_000  # characters in which boxes are looked for
_CUT_OFF = re.compile(r"</|<\|")  # the beginning of a closing tag or of a special token


def final_answer(text: str) -> str | None:
    """What stands in the last complete `<answer>...</answer>`, else what follows an `<answer>` that is never closed, stripped.

    None without any. A text that ends early has given its answer all the same.
    """
    closed = chat_answer(text)
    if closed is not None:
        return closed
    opened = (_CUT_OFF.split(part, maxsplit=1)[0].strip() for part in reversed(text.split("<answer>")[1:]))
    return next(filter(None, opened), None)


def boxes(text: str) -> list[str]:
    """Content of every `\\boxed{...}` that holds something and no other box, in order; of a huge text, in its end alone."""
    text = text[-_SEARCHED:]
    spans = boxed_spans(text)
    innermost = [(a, b) for i, (a, b) in enumerate(spans) if i + 1 == len(spans) or spans[i + 1][0] >= b]
    return [content for a, b in innermost if (content := text[a:b].strip())]


def plain(text: str) -> str:
    """An answer without LaTeX, Markdown and Unicode: `9{,}500` is 9500, `\\frac{1}{2}` is ((1)/(2)), a cross is *, a raised 2 ^(2).

    Of brackets only round ones are left, words stay, and what cannot be written so becomes `UNREADABLE`.
    """
    text = _SUPERSCRIPT.sub(lambda match: f"^({match[0].translate(_UNRAISED)})", text.translate(_CHARACTERS))
    for pattern, replacement in _BEFORE_FRACTIONS:
        text = pattern.sub(replacement, text)
    for _ in range(_MAX_NESTED):
        text, changes = _FRACTION.subn(_divided, text)
        if not changes:
            break
    for pattern, replacement in _AFTER_FRACTIONS:
        text = pattern.sub(replacement, text)
    return text.translate(_BRACKETS)


def _divided(match: re.Match) -> str:
    above, below = (group.strip("{} ") for group in match.groups())
    before = match.string[max(match.start() - 2, 0) : match.start()].rstrip()
    mixed = before[-1:].isdigit() and above.isdigit() and below.isdigit()  # 3\frac{1}{2}
    return f" {above}/{below} " if mixed else f"(({above})/({below}))"


def _characters() -> dict[int, str]:
    """One Unicode character to plain text."""
    table = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms
    table |= {code: str((code - 0x1D7CE) % 10) for code in range(0x1D7CE, 0x1D800)}  # bold and other digits
    for plain_form, characters in {
        "-": "\u2010\u2011\u2012\u2013\u2014\u2212\u2796\ufe63\uff0d",
        "+": "\u2795\ufe62\uff0b",
        "*": "\u00d7\u00b7\u22c5\u2219\u2217\u2022\u2715\u2716\u2a2f\u2a09\u2731\uff0a",
        "/": "\u00f7\u2215\u2044\u2797\uff0f",
        "=": "\u2248\u2245\u2243\u2261\u21d2\u2192\u27f9\uff1d",
        "'": "\u2018\u2019\u02bc",
        '"': "\u201c\u201d",
        "(": "\u3010",
        ")": "\u3011",
        "$": "\u00a2\u00a3\u00a4\u00a5\u20a0\u20a3\u20a4\u20a6\u20a9\u20aa\u20ab\u20ac\u20b9\u20bd\u20bf\uff04\uffe1\uffe5",
        _THIN: "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f",
        "": "\u200b\u200c\u200d\u2060\ufeff\ufe0f",  # no width; \ufe0f asks for the emoji form
        " ": "\u00b0\u3000\x00",
        UNREADABLE: "\u221a\u00b1\u2260",
    }.items():
        table |= {ord(character): plain_form for character in characters}
    for character in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞":
        table[ord(character)] = " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/") + " "
    return table


_THIN = "\u2009"
_CHARACTERS = _characters()
_BRACKETS = str.maketrans("{}[]", "()()", "`\"'")
_SUPERSCRIPT = re.compile("[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_UNRAISED = str.maketrans("\u207a\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "+-0123456789")

_MAX_NESTED = 40
_FRACTION = re.compile(r"\\[dtc]?frac\s*(\{[^{}]*\}|[0-9])\s*(\{[^{}]*\}|[0-9])")


def _unwrapped(match: re.Match) -> str:
    return f" {match[1]} " if any(map(str.isalpha, match[1])) else match[1]


def _rules(*pairs: tuple) -> list[tuple[re.Pattern, object]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


_FONT = r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it|sf|tt|bin|rel|ord|normal)|[mhf]box|boxed|operatorname|bm|boldsymbol|underline|emph)"
_BEFORE_FRACTIONS = _rules(
    (r"<<[^<>\n]{0,200}>>", ""),  # GSM8K's calculator annotations
    (r"</?[a-zA-Z][^<>\n]{0,40}>", " "),
    (r"\\\\(?:\[[^\[\]\n]{0,9}\])?", "\n"),  # line break
    (r"\\(?:begin|end)\{[a-z]{1,12}\*?\}(?:\{[clr| ]{0,20}\})?", " "),
    (
        r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|bf|rm|it|tiny|scriptsize|footnotesize|small|normalsize|[lL]arge|LARGE|[hH]uge)(?![a-zA-Z])",
        "",
    ),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])", " "),
    (r"(?:\\math(?:ord|punct)|(?<![a-zA-Z]))\{\s*([-+,.])\s*\}", r"\1"),
    (r"-+>", "="),
    (r"\{\s*\}", ""),
    (r"(?:(?:\\[,;:! >]|\\(?:thinspace|nobreakspace|medspace)(?![a-zA-Z])|~) *)+", _THIN),
    (r"\{\u2009+\}", _THIN),
    (_FONT + r"\s*\{([^{}\n]*)\}", _unwrapped),
    (_FONT + r"\s*\{([^{}\n]*)\}", _unwrapped),  # one inside another
    (r"\\(?:boxed|fbox)(?![a-zA-Z])\s*\{?", " "),  # never closed
    (
        r"(?<![0-9.,])([0-9]{1,3}(?:(?:\u2009?,\u2009?|\u2009|')[0-9]{3})+)(?![0-9])",
        lambda match: re.sub("[^0-9]", "", match[1]),
    ),
    (r"(?<![\w)])\*\*([^*\n]{1,200})\*\*", r" \1 "),  # bold
    (r"\\(?:times|cdotp?|ast|star|bullet)(?![a-zA-Z])", "*"),
    (r"\\div(?![a-zA-Z])", "/"),
    (r"\{\s*([*/])\s*\}", r"\1"),
    (r"\\(?:approx|simeq|cong|equiv|implies|iff|to|(?:long)?rightarrow|Rightarrow|Longrightarrow)(?![a-zA-Z])", "="),
    (r"\\(?:quad|qquad|enspace|space|hfill|newline|therefore|hline|checkmark|par)(?![a-zA-Z])", " "),
    (r"\\\{", "("),
    (r"\\\}", ")"),
    (r"\\([$%#&_])", r"\1"),
    (r"\\[()\[\]]", " "),
)
_AFTER_FRACTIONS = _rules(
    (r"\\[a-zA-Z]*", UNREADABLE),
    (r"-\s*\$+\s*(?=[0-9.])", "-"),
    (r"```[a-z]*", "\n"),
    (r"(?<=[0-9)])\s*\*\*\s*(?=[0-9(])", "^"),
    (r"\*\*", ""),
    (r"[$&\u2009\t]", " "),
)
