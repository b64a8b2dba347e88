"""Answers in one plain LaTeX: Unicode, markdown, spacing commands and synonyms are gone, what they mean is kept."""

from __future__ import annotations

import re
import unicodedata

_CHARACTERS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d", "-"),
    **dict.fromkeys("\u00d7\u2715\u2716\u2a2f", r"\cdot "),
    **dict.fromkeys("\u00b7\u22c5\u2219\u2022\u2217", r"\cdot "),
    **dict.fromkeys("\u00f7", "/"),
    **dict.fromkeys("\u2215\u2044", "/"),
    **dict.fromkeys("\u2264\u2a7d\u2266", r"\le "),
    **dict.fromkeys("\u2265\u2a7e\u2267", r"\ge "),
    **dict.fromkeys("\u03c0\U0001d70b\U0001d6d1\u03d6", r"\pi "),
    **dict.fromkeys("\u00b0\u00ba\u02da", r"^\circ "),
    **dict.fromkeys("\u2205\u2300\u00d8\U0001d6c0", r"\emptyset "),
    **dict.fromkeys("\u2009\u202f\u00a0\u2007\u2006\u2008\u2002\u2003\u3000\u2005\u2004\u200a", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u2061\u2062\u2063\u2064", ""),
    **dict.fromkeys("\u2032\u2019\u02b9", "'"),
    **dict.fromkeys("\u27e8\u3008\u2329", r"\langle "),
    **dict.fromkeys("\u27e9\u3009\u232a", r"\rangle "),
    **{"\u221e": r"\infty ", "\u221a": r"\sqrt ", "\u221b": r"\sqrt[3]", "\u221c": r"\sqrt[4]", "\u00b1": r"\pm "},
    **{"\u2213": r"\mp ", "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2216": r"\setminus "},
    **{"\u2260": r"\ne ", "\u2026": r"\ldots ", "\u22ef": r"\ldots ", "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}"},
    **{"\u230a": r"\lfloor ", "\u230b": r"\rfloor ", "\u2308": r"\lceil ", "\u2309": r"\rceil ", "\u2236": ":"},
    **{"\u2227": r"\land ", "\u2228": r"\lor ", "\u2223": "|", "\u2115": r"\mathbb{N}", "\u211a": r"\mathbb{Q}"},
    **{"\u20ac": r"\text{euros}", "\u00a3": r"\text{pounds}", "\u00a5": r"\text{yen}", "\u20b9": r"\text{rupees}"},
    **{"\u00a2": r"\text{cents}", "\u3001": ",", "\u3002": ".", "\u2248": r"\approx ", "\u2148": "i", "\u2147": "e"},
    **{"\u2033": '"', "\u2220": r"\angle ", "\u25b3": r"\triangle ", "\u2261": r"\equiv "},
    **{"\u2245": r"\cong ", "\u2243": r"\simeq ", "\u223c": r"\sim ", "\u221d": r"\propto ", "\u2209": r"\notin "},
    **{"\u2262": r"\not\equiv ", "\u2249": r"\not\approx ", "\u2247": r"\not\cong ", "\u00ac": r"\neg "},
}
_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho . sigma tau upsilon phi chi psi omega"
_CHARACTERS |= {chr(0x3B1 + k): rf"\{name} " for k, name in enumerate(_GREEK.split()) if name not in (".", "pi")}
_TABLE = str.maketrans(_CHARACTERS)


def _runs(kind: str, characters: range | list[int]) -> re.Pattern:
    found = [chr(c) for c in characters if unicodedata.decomposition(chr(c)).startswith(f"<{kind}>")]
    return re.compile("[" + re.escape("".join(c for c in found if c not in "\u00ba\u00aa")) + "]+")


_SUPERSCRIPTS = _runs("super", [*range(0xB2, 0xBA), *range(0x2070, 0x2080), *range(0x1D43, 0x1D6B)])
_SUBSCRIPTS = _runs("sub", [*range(0x2080, 0x209D), *range(0x1D62, 0x1D6B)])
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e\u2189]")

_TEXT_COMMANDS = "text|mbox|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathit|mathbf|mathsf|boldsymbol|bm|bf|rm|emph|underline|hbox"
_WORDS = {
    **dict.fromkeys(("pi",), r"\pi "),
    **dict.fromkeys(("infinity", "infty", "inf", "oo"), r"\infty "),
    **dict.fromkeys(("and",), r"\land "),
    **dict.fromkeys(("or",), r"\lor "),
    **{name: rf"\{name} " for name in ("sqrt", "sin", "cos", "tan", "cot", "csc", "ln", "log", "exp", "cis")},
    **{name: rf"\{name} " for name in ("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh")},
    **dict.fromkeys(("degrees", "degree", "deg"), r"^\circ "),
    **dict.fromkeys(("percent", "percents"), "%"),
    "union": r"\cup ",
}
_SPACE = r"(?:\s|\\[,;: ]|~)"
_OPTION = r"\s*(?:\[[^\[\]]*\]\s*)*"
_DECORATION = rf"boxed|f(?:rame)?box{_OPTION}|(?:textcolor|colorbox){_OPTION}\{{[^{{}}]*\}}|fcolorbox{_OPTION}(?:\{{[^{{}}]*\}}){{2}}"
_DECORATED = rf"\\(?:{_DECORATION})\s*\{{((?:[^{{}}]|\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})*)\}}"

# in this order: digits that are spaced or grouped, then layout, synonyms, and what models type instead of LaTeX
_RULES: list[tuple[re.Pattern, str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (
            r"(?<!\\)\\\\(?=(?:d?frac|sqrt|pi|text|left|right|cdot|times|infty|boxed|circ|pm)(?![a-zA-Z]))",
            r"\\",
        ),  # escaped twice
        (r"\{,\}(?=\d{3}(?!\d))", r",\\!"),
        (r"(?<=\d)'(?=\d{3}(?!\d))", ""),
        (r"(?<=\d)\{,\}(?=\d)", "."),  # a decimal comma
        (r"(?<=\d)\{\}(?=\d)", ""),
        (rf"(?<=\d)(?:,\\!|\\[,;: ]|~){_SPACE}*(?=\d{{3}}(?!\d))", ""),
        (r"(?<![\d.,_^{} ])(\d{1,3}) (\d{3}) (\d{3})(?![\d.,])", r"\1\2\3"),
        (r"(?<![\d.,_^{} ])(\d{1,3}) (\d{3})(?![\d., ])", r"\1\2"),
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|nonumber|notag|therefore|because)(?![a-zA-Z])", ""),
        (
            r"\\(?:hspace|vspace|kern|phantom|vphantom|hphantom|label|tag|color)\*?\s*(?:\[[^\[\]]*\])?\s*\{[^{}]*\}",
            " ",
        ),
        (r"(?<!\\)\\(?:[,;:! ]|(?:quad|qquad|thinspace|enspace|hfill|allowbreak)(?![a-zA-Z]))|(?<!\\)~", " "),
        (r"\\\\\s*\[[^\[\]]*(?:pt|em|ex|mm|cm)\]", r"\\\\"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (r"\\(?:leq|leqslant|leqq)(?![a-zA-Z])|<=|=<(?!=)", r"\\le "),
        (r"\\(?:geq|geqslant|geqq)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq?(?![a-zA-Z])|!=|\\not\s*=|=/=", r"\\ne "),
        (r"(?<!\\not)(?<!\\not )\\(?:equiv|cong|simeq)(?![a-zA-Z])(?!.*mod)", "= "),  # but x \equiv 5 \pmod 7
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\lbrack(?![a-zA-Z])", "["),
        (r"\\rbrack(?![a-zA-Z])", "]"),
        (r"\\[lr]?vert(?![a-zA-Z])|\\mid(?![a-zA-Z])", "|"),
        (r"\\varnothing(?![a-zA-Z])|\\O(?![a-zA-Z])", r"\\emptyset "),
        (r"\\(?:times|cdotp|ast|bullet)(?![a-zA-Z])", r"\\cdot "),
        (r"\\(?:div|slash)(?![a-zA-Z])", "/"),
        (r"\\(?:infin|inf)(?![a-zA-Z])", r"\\infty "),
        (r"\\(?:vee)(?![a-zA-Z])", r"\\lor "),
        (r"\\(?:wedge)(?![a-zA-Z])|\\&", r"\\land "),
        (r"\\(?:dots|ldots|cdots|dotsc|dotsb|dotso)(?![a-zA-Z])|\.{3,}", r"\\ldots "),
        (r"\\(?:colon|ratio)(?![a-zA-Z])", ":"),
        (r"\\(?:reals|R|Reals)(?![a-zA-Z])|\\mathbf\s*\{?\s*R\s*\}?|\\mathbb\s*R(?![a-zA-Z])", r"\\mathbb{R}"),
        (r"\\(?:degree|textdegree|celsius)(?![a-zA-Z])", r"^\\circ "),
        (r"\^\s*\{?\s*\^\s*\{?\s*\\circ\s*\}?\s*\}?|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])", r"^\\circ "),
        (r"\^\\circ\s*(?:\\(?:text|mathrm)\s*\{\s*)?([CF])(?![a-zA-Z])\s*\}?", r"\\text{degrees \1}"),
        (r"\^\s*\{(\d+)\}\s*/\s*_\s*\{(\d+)\}", r"\\frac{\1}{\2}"),
        (r"(?<![\d])\.(?=\s*\\(?:overline|bar|dot)(?![a-zA-Z]))", "0."),
        (r"\{((?:[^{}]|\{[^{}]*\})*)\\choose(?![a-zA-Z])((?:[^{}]|\{[^{}]*\})*)\}", r"\\binom{\1}{\2}"),
        (r"\\operatorname\*?\s*\{\s*([a-zA-Z]+)\s*\}", r"\\\1 "),
        (r"(?<=[\])}])\s*U\s*(?=[\[(\\])", r"\\cup "),
        (r"(?<![a-zA-Z])([apAP])\.\s?m\b\.?", r"\1m"),
        (r"\\%", "%"),
        (r"\\#", ""),
        (_DECORATED, r"\1"),
        (_DECORATED, r"\1"),  # within one another
        (r"\+\s*/\s*-|\+-(?=\s*[\d\\a-zA-Z(])", r"\\pm "),
        (r"(?<=[\w)}\]])\s*\*\*\s*(?=[\w({\\-])", "^"),
        (r"(?<![A-Za-z\\])((?:\d+(?:\.\d*)?|\.\d+))[eE]([+-]?\d+)(?![\w.])", r"(\1\\cdot 10^{\2})"),
    ]
]
_TEXT = re.compile(
    rf"\\(?:{_TEXT_COMMANDS})(?![a-zA-Z])\s*(?:\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}|\s([a-zA-Z])(?![a-zA-Z]))"
)
PROSE = re.compile(
    r"^(?:(?:so|thus|hence|therefore),?\s+)?(?:(?:the|our|my)\s+)?(?:(?:final|correct|required)\s+)?(?:answer|result|solution|value|option|choice)"
    r"(?:\s+(?:is|are|=|:)|\s*[:=])\s*|^(?:option|choice)\s+(?=\(?[A-Z]\b)|^\s*(?:=|\\implies|\\Rightarrow|\\approx(?=\s*$))\s*",
    re.IGNORECASE,
)
_WRAPPERS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")]
_WRAPPERS += [(mark, mark) for mark in ("**", "__", "```", "`", "*")]
_COMBINED = re.compile("((?:[0-9][\u0304\u0305])+)")


def plain(text: str) -> str:
    """The answer in plain LaTeX. Words stand in `\\text{...}` only where the answer put them there."""
    text = typeset(text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _TEXT.sub(_text, text)
    text = text.replace(r"\$", r"\text{dollars}")
    text = text.replace("$", "" if text.count("$") % 2 == 0 else r"\text{dollars}")
    text = re.sub(r"(?<![a-zA-Z\\])([a-zA-Z]{2,})(?![a-zA-Z])", _word, _outside_text(text))
    text = text.replace("\ue000", r"\text{").replace("\ue001", "}").replace("\u200b", "")
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?:\s|(?<!\\)[.,;:]|\\)+$", "", text)


def typeset(text: str) -> str:
    """The answer in LaTeX without Unicode, and without what is wrapped around it: markdown, dollars, "the answer is"."""
    text = _unicode(text)
    for _ in range(4):  # wrappers within wrappers
        text, before = _unwrapped(text), text
        if text == before:
            break
    return text


def _unicode(text: str) -> str:
    text = _VULGAR.sub(lambda m: r"\frac{%s}{%s}" % tuple(unicodedata.normalize("NFKC", m[0]).split("\u2044")), text)  # noqa: UP031
    text = _SUPERSCRIPTS.sub(lambda m: "^{" + unicodedata.normalize("NFKC", m[0]).translate(_TABLE) + "}", text)
    text = _SUBSCRIPTS.sub(lambda m: "_{" + unicodedata.normalize("NFKC", m[0]).translate(_TABLE) + "}", text)
    text = _COMBINED.sub(lambda m: r"\overline{" + re.sub("[\u0304\u0305]", "", m[0]) + "}", text)
    text = re.sub("([0-9])\u0307", r"\\dot{\1}", text)
    return unicodedata.normalize("NFKC", text.translate(_TABLE)).translate(_TABLE)


def _unwrapped(text: str) -> str:
    text = text.strip().strip('"\u201c\u201d').strip()
    if text.startswith("**"):  # not a power
        text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text)
    for left, right in _WRAPPERS:
        inner = text[len(left) : len(text) - len(right)]
        if text == left + inner + right and left not in inner and right not in inner:
            return inner
    for ending in (".", ",", ";"):
        if text.endswith(ending) and not text.endswith("..") and not text.endswith("\\" + ending):
            return text[:-1]
    return PROSE.sub("", text)


def _text(match: re.Match) -> str:
    content = (match[1] if match[1] is not None else match[2]).strip()
    if len(content) == 1 and content.isalpha():
        return f" {content} " if not match[0].startswith(r"\text") else rf"\text{{{content}}}"
    bare = content.strip(" .,").lower()
    if bare in ("and", "or", "degrees", "degree", "percent", "union"):
        return _WORDS[bare]
    if re.fullmatch(r"[-+]?[\d.,]+", content):
        return content
    return rf"\text{{{content}}}" if content else " "


def _outside_text(text: str) -> str:
    """The text with its `\\text{...}` marked by private characters, so that words inside are left alone."""
    return re.sub(r"\\text\{([^{}]*)\}", lambda m: "\ue000" + "\u200b".join(m[1]) + "\ue001", text)


def _word(match: re.Match) -> str:
    return _WORDS.get(match[0].lower(), match[0])
