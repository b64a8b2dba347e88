"""Answers read from LaTeX: a number or function, a list, a set, a point, a set of reals, an equation, a matrix, a numeral, or words."""

from __future__ import annotations

import functools
import itertools
import re

from .expression import parse
from .kinds import (
    EVERYTHING,
    Answer,
    Clock,
    Equation,
    Expression,
    Falsehood,
    Inequality,
    Interval,
    Many,
    Matrix,
    Named,
    Ratio,
    Reals,
    Words,
)
from .nodes import Node, UnreadableError, minus
from .plain import plain
from .reals import as_reals, common, numbers_in, without_points
from .scan import grouped, signed, split
from .units import is_prose, numeral, without_unit, words
from .values import UndefinedError, equal_functions, equal_numbers, linear_root, start_work

LONGEST = 2_000  # characters; what is longer is no answer
_RELATION = ("=", "<", ">", r"\le", r"\ge", r"\ne", r"\in")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\{(?:[pbBvV]?matrix|smallmatrix|array)\}(?:\{[clr| ]*\})?(.*)\\end\{(?:[pbBvV]?matrix|smallmatrix|array)\}\s*[)\]]?$",
    re.DOTALL,
)
_LABEL = re.compile(
    r"\s*(?:\\text\{[^{}]*\}|[a-zA-Z]|\\[a-zA-Z]+)(?:_\s*(?:\{[^{}]*\}|\w))?(?:\s*\^\s*\{\s*-1\s*\})?'*\s*(?:\(\s*[^()=]*\s*\))?(?:\s*\\text\{[^{}]*\})?\s*"
)
_FRENCH_START, _FRENCH_END = re.compile(r"(?:^|(?<=\\cup )|(?<=\\in ))\]"), re.compile(r"\[(?=\s*(?:$|\\cup))")
_LIST_COMMA = re.compile(r"\{,\}(?!\d{3}(?!\d))")
_SENTENCE = re.compile(r"(?<![\\a-zA-Z])(?:[a-zA-Z]{5}|[a-zA-Z]{2,} [a-zA-Z]{2})")
_SAID = re.compile(r"\b(?:is|are|equals)\b|=|:")
_FORMULA = re.compile(r"\$([^$]+)\$|\\\(((?:[^\\]|\\[^)])+)\\\)")
_QUANTITY = re.compile(
    r"\([a-zA-Z](?:\s*\\(?:circ|cdot)\s*[a-zA-Z])+\)\s*\([a-zA-Z]\)|m?\\(?:angle|triangle)\s*\w+|(?=.*\\text\{)(?![\d(])(?!\\(?!text))[^=]*|[a-zA-Z]{5,}[a-zA-Z ]*"
)
_LETTER = r"(?:[a-zA-Z]|\\(?!text)[a-zA-Z]+)(?:\s*_\s*(?:\w|\{\w+\}))?'*\s*"
_LETTERS = rf"\s*{_LETTER}(?:,\s*{_LETTER})+"
_POINT_LABEL = re.compile(rf"\({_LETTERS}\)|\\langle{_LETTERS}\\rangle")
_BARE_POINT_LABEL = re.compile(rf"({_LETTERS})=\s*([^=]+)")
_CLOCK = re.compile(
    r"(?:\\text\{)?\s*(\d{1,2})\s*\{?:\}?\s*([0-5]\d)\s*\}?\s*(?:\\text\{)?\s*(am|pm|noon|midnight)?\s*\}?",
    re.IGNORECASE,
)


def read(text: str, thousands: bool = True) -> Answer:
    """The answer as a thing to compare. thousands: whether 1,234 and 1{,}5 are one number. UnreadableError."""
    if len(text) > LONGEST:
        raise UnreadableError("too long")
    if not thousands:
        text = _LIST_COMMA.sub(",", text)
    text = _FRENCH_END.sub(")", _FRENCH_START.sub("(", plain(text)))
    return _read(grouped(text) if thousands else text)


def reads_as_mathematics(text: str) -> bool:
    """Whether a text is an answer other than words."""
    start_work()
    try:
        return not isinstance(read(text), Words)
    except (UnreadableError, RecursionError, ArithmeticError):
        return False


def is_list(text: str) -> bool:
    """Whether a text is several answers, in no order."""
    start_work()
    try:
        answer = _unnamed(read(text))
    except (UnreadableError, RecursionError, ArithmeticError):
        return False
    return isinstance(answer, Many) and answer.kind in ("list", "set") and len(answer.items) > 1


def answer_in_prose(text: str) -> str:
    """The answer in a sentence: its last `$...$` or `\\(...\\)`, or what "is", "are" or "=" says last. The text, if it is one as a whole."""
    text = text[-LONGEST:]
    if reads_as_mathematics(text):
        return text
    if formulas := _FORMULA.findall(text):
        return next(part for part in formulas[-1] if part)
    said = _SAID.split(text)[-1]
    return said if reads_as_mathematics(said) else text


def _read(text: str) -> Answer:
    if not text:
        raise UnreadableError("nothing")
    if text in (r"\emptyset", r"\{\}", r"\{ \}", "{}"):
        return Many("set", ())
    if text.replace(" ", "") in (r"\infty", r"+\infty", r"-\infty"):
        return Words("-infinity" if "-" in text else "infinity")
    if text == r"\mathbb{R}":
        return EVERYTHING
    if (match := _CLOCK.fullmatch(text)) and int(match[1]) <= 24:
        return Clock(int(match[1]), int(match[2]), (match[3] or "").lower())
    if text.startswith(r"\text{") and (match := re.fullmatch(r"\\text\{([^{}]*)\}", text)):
        return words(match[1])
    if (digits := numeral(text)) is not None:
        return digits
    if (point := _named_point(text)) is not None:
        return point
    if len(connected := split(text, (r"\lor", r"\land", ";"))) > 1 or (len(connected := split(text, (",",))) > 1):
        return _connected(connected)
    united = split(text, (r"\cup", r"\setminus"))
    if (relations := split(text, _RELATION)[1:]) and (len(united) < 2 or relations[0][0] == r"\in"):
        return _relation(text)
    if len(united) > 1:
        return _union(united)
    if (bracketed := _bracketed(text)) is not None:
        return bracketed
    if any(sign in text for sign in (r"\pm", r"\mp")):
        return _listed([_read(one) for one in signed(text)], "list")
    if match := _MATRIX.match(text):
        rows = [row for _, row in split(match[1].strip(), (r"\\", r"\cr"))]
        rows = [row for row in rows if row and row != r"\hline"]
        return Matrix(tuple(tuple(_read(cell) for _, cell in split(row, ("&",))) for row in rows))
    if len(terms := split(text, (":",))) > 1:
        return Ratio(tuple(parse(term) for _, term in terms))
    return _expression(text)


def _named_point(text: str) -> Answer | None:
    """x, y = 1, 2 and x, y = (1, 2), if there is a value for every letter."""
    if (match := _BARE_POINT_LABEL.fullmatch(text)) is None:
        return None
    count, value = match[1].count(",") + 1, _read(match[2])
    if not isinstance(value, Many) or value.kind not in ("list", "point") or len(value.items) != count:
        return None
    return Named(f"({match[1].replace(' ', '')})", Many("point", value.items))


def _connected(pieces: list[tuple[str, str]]) -> Answer:
    """Answers joined by commas and words. Of inequalities, "and" means that both hold, "or" and a comma that one does."""
    pieces = [(separator, piece) for separator, piece in pieces if piece]
    if len(pieces) == 1:
        return _read(pieces[0][1])
    if not pieces:
        raise UnreadableError("only commas")
    first, unequal, _ = pieces[0][1].partition(r"\ne ")
    if unequal and not any(split(piece, _RELATION)[1:] for _, piece in pieces[1:]):  # x is not 1, 2
        pieces = [pieces[0], *((separator, first + unequal + piece) for separator, piece in pieces[1:])]
    answers = [_read(piece) for _, piece in pieces]
    sets = [answer for answer in answers if isinstance(answer, Reals)]
    if len(sets) == len(answers):
        names = {reals.variable for reals in sets if reals.variable is not None}
        if len(names) > 1:
            raise UnreadableError("inequalities of several letters")
        joined = (
            functools.reduce(common, sets)
            if unequal or pieces[1][0] == r"\land"
            else Reals(tuple(part for reals in sets for part in reals.parts))
        )
        return Reals(joined.parts, *names)
    if sets or any(isinstance(answer, Inequality) for answer in answers):
        raise UnreadableError("inequalities among other things")
    return _listed(answers, "list")


def _listed(answers: list[Answer], kind: str) -> Answer:
    """Answers as one, with the lists among them (from a plus-minus sign) taken apart."""
    flat = []
    for answer in answers:
        name, inner = (answer.name, answer.value) if isinstance(answer, Named) else (None, answer)
        if isinstance(inner, Many) and inner.kind == "list":
            flat += [Named(name, item) if name else item for item in inner.items]
        else:
            flat.append(answer)
    names = [answer.name if isinstance(answer, Named) else None for answer in flat]
    if names and names[0] is not None and all(name in (None, names[0]) for name in names):  # x = 1, x = 2, and x = 1, 2
        flat = [answer.value if isinstance(answer, Named) else answer for answer in flat]
        return Named(names[0], Many(kind, tuple(flat)))
    return Many(kind, tuple(flat))


def _bracketed(text: str) -> Answer | None:
    """(a, b), [a, b), {a, b}, \\langle a, b \\rangle; None if the text is not one pair of brackets with a comma inside."""
    left = next((bracket for bracket in (r"\{", r"\langle", "(", "[", "]", "{") if text.startswith(bracket)), None)
    right = next((bracket for bracket in (r"\}", r"\rangle", ")", "]", "[", "}") if text.endswith(bracket)), None)
    if left is None or right is None or len(text) < len(left) + len(right):
        return None
    body = text[len(left) : -len(right)].strip()
    if (left, right) == ("{", "}") and len(split(body, (",",))) > 1:  # as a model types it
        left, right = r"\{", r"\}"
    try:
        pieces = [piece for _, piece in split(body, (",", ";"))]
        if left == r"\{" and len(builder := split(body, ("|", ":"))) == 2:
            return _read(builder[1][1])  # {x | x > 2}
    except UnreadableError:
        return None  # (1)(2)
    if left == r"\{" and right == r"\}":
        kept = [piece for piece in pieces if piece]
        return _unnamed(_listed([_read(piece) for piece in kept], "set"))
    if len(pieces) < 2 or not all(pieces):
        return None if len(pieces) < 2 else _refuse("an empty place")
    half_open = (left, right) in (("(", "]"), ("[", ")"), ("]", "]"), ("[", "["), ("]", "["), ("(", "["), ("]", ")"))
    if half_open or (len(pieces) == 2 and any(r"\infty" in piece for piece in pieces)):
        return Reals((_interval(pieces, left == "[", right == "]"),))
    if any(sign in body for sign in (r"\pm", r"\mp")):
        return _listed([_read(left + one + right) for one in signed(body)], "list")
    return Many("square" if left == "[" else "point", tuple(_read(piece) for piece in pieces))


def _unnamed(answer: Answer) -> Answer:
    return answer.value if isinstance(answer, Named) else answer


def _refuse(reason: str) -> Answer:
    raise UnreadableError(reason)


def _interval(pieces: list[str], has_low: bool, has_high: bool) -> Interval:
    if len(pieces) != 2:
        raise UnreadableError("an interval of more than two ends")
    low, high = _end(pieces[0], "-"), _end(pieces[1], "+")
    return Interval(low, high, has_low and low is not None, has_high and high is not None)


def _end(text: str, sign: str) -> Node | None:
    if r"\infty" in text:
        if text.replace(" ", "") not in ((r"-\infty",) if sign == "-" else (r"\infty", r"+\infty")):
            raise UnreadableError("an infinity on the wrong side")
        return None
    node = parse(text)
    if node.symbols():
        raise UnreadableError("an interval between letters")
    return node


def _union(pieces: list[tuple[str, str]]) -> Reals:
    parts: list[Interval] = []
    for separator, piece in pieces:
        more = as_reals(_read(piece))
        if more is None:
            raise UnreadableError("a union of other things")
        if separator == r"\setminus":
            points = [part.low for part in more.parts if part.low is not None and part.low == part.high]
            if parts != list(EVERYTHING.parts) or len(points) != len(more.parts):
                raise UnreadableError("a difference of sets")
            parts = list(without_points(points).parts)
        else:
            parts += more.parts
    return Reals(tuple(parts))


def _relation(text: str) -> Answer:
    pieces = split(text, _RELATION)
    relations = [relation for relation, _ in pieces[1:]]
    sides = [side for _, side in pieces]
    if not all(sides):
        raise UnreadableError("a relation without a side")
    if relations == [r"\in"]:
        inner = _read(sides[1])
        reals = (
            inner
            if isinstance(inner, Reals)
            else as_reals(inner)
            if isinstance(inner, Many) and inner.kind != "set"
            else None
        )
        return Reals(reals.parts, sides[0]) if reals is not None else Named(sides[0], inner)
    if set(relations) == {"="}:
        return _equality(sides)
    if relations == [r"\ne"] and _is_variable(sides[0]):
        answer = _read(sides[1])
        points = numbers_in(answer.items if isinstance(answer, Many) and answer.kind == "list" else (answer,))
        if points is None:
            raise UnreadableError("unequal to what is no number")
        return Reals(without_points(points).parts, sides[0])
    return _inequality(sides, relations)


def _is_variable(text: str) -> bool:
    return (
        re.fullmatch(r"[a-zA-Z](?:_\s*(?:\w|\{\w+\}))?|\\(?:theta|alpha|beta|lambda|mu|phi)", text.strip()) is not None
    )


def _equality(sides: list[str]) -> Answer:
    """name = value, statements about numbers, and equations. Of a chain, the last side is what it says."""
    if len(sides) == 2 and _is_variable(sides[1]) and not _LABEL.fullmatch(sides[0]):
        sides = sides[::-1]  # 5 = x
    if (name := _name(sides[0])) is not None:
        if any(_contradict(left, right) for left, right in itertools.pairwise(sides[1:])):
            return Falsehood()
        return Named(name, _read(sides[-1]))
    nodes = [parse(without_unit(side)[0]) for side in sides]
    if not any(node.symbols() for node in nodes):
        contradiction = any(_contradict(left, right) for left, right in itertools.pairwise(sides))
        return Falsehood() if contradiction else _read(sides[-1])
    if all(_same_function(left, right) for left, right in itertools.pairwise(nodes)):
        return _read(sides[-1])  # an identity, from one form to the next
    if len(nodes) != 2:
        raise UnreadableError("a chain of equations")
    return Equation(minus(*nodes), None if nodes[1].symbols() else nodes[1])


def _name(side: str) -> str | None:
    """What stands on the left of name = value: x, f(x), (x, y), words, or what is written like an angle or a length."""
    if (_LABEL.fullmatch(side) and side not in ("e", "i", r"\pi", r"\infty")) or _POINT_LABEL.fullmatch(side):
        return re.sub(r"\\text\{([^{}]*)\}|\s", r"\1", side)
    return "" if _QUANTITY.fullmatch(side) else None


def _same_function(a: Node, b: Node) -> bool:
    try:
        return equal_functions(a, b) is True
    except UndefinedError:
        return False


def _contradict(left: str, right: str) -> bool:
    """Whether two sides that are numbers are not the same one."""
    try:
        nodes = [parse(without_unit(side)[0]) for side in (left, right)]
        return not any(node.symbols() for node in nodes) and not equal_numbers(*nodes)
    except (UnreadableError, UndefinedError):
        return False


def _inequality(sides: list[str], relations: list[str]) -> Answer:
    """x < a, a < x <= b and the like, for a letter x, or any other inequality of two sides."""
    if set(relations) <= {">", r"\ge"}:
        sides, relations = sides[::-1], [_FLIPPED[relation] for relation in relations[::-1]]
    if not set(relations) <= {"<", r"\le"}:
        raise UnreadableError("relations of several kinds")
    if len(sides) == 3 and _is_variable(sides[1]):
        has_low, has_high = (relation == r"\le" for relation in relations)
        return Reals((_interval([sides[0], sides[2]], has_low, has_high),), sides[1])
    if len(sides) == 3:
        first, second = (_inequality(sides[k : k + 2], [relations[k]]) for k in (0, 1))
        if not (isinstance(first, Reals) and isinstance(second, Reals)):
            raise UnreadableError("an inequality of three sides that is not linear")
        return Reals(common(first, second).parts, first.variable)
    if len(sides) != 2:
        raise UnreadableError("an inequality of more than three sides")
    low, high = map(parse, sides)
    strict, positive = relations == ["<"], minus(high, low)
    symbols = positive.symbols()
    if not symbols:
        raise UnreadableError("an inequality of numbers")
    if len(symbols) > 1 or (solved := linear_root(positive)) is None:
        return Inequality(positive, strict)
    root, direction = solved
    part = Interval(root, None, not strict, False) if direction > 0 else Interval(None, root, False, not strict)
    return Reals((part,), *symbols)


def _expression(text: str) -> Answer:
    text, unit = without_unit(text)
    if is_prose(text):
        return words(text)
    if _SENTENCE.search(text):
        raise UnreadableError("a sentence")
    return Expression(parse(text), unit)
