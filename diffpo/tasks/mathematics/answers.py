"""What an answer is: a number or function, a list, a set, a point, a set of reals, an equation, a matrix, a numeral, or words."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from .expression import Node, UnreadableError, number, parse
from .plain import plain

LONGEST = 2_000  # characters; what is longer is no answer


@dataclass(frozen=True)
class Expression:
    """A number, or a function of its symbols, perhaps with a unit ("cm", "dollar"; degrees and per cent are part of the node)."""

    node: Node
    unit: str | None = None


@dataclass(frozen=True)
class Words:
    """Text: its letters and digits, without case."""

    key: str


@dataclass(frozen=True)
class Many:
    """Several answers. kind: "list" (bare, in no order), "set", "point" (in order), "square" (in order, or a closed interval)."""

    kind: str
    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Numeral:
    """Digits in a base, which are not their value: the question was how to write them."""

    digits: str
    base: int


@dataclass(frozen=True)
class Named:
    """name = value."""

    name: str
    value: Answer


@dataclass(frozen=True)
class Equation:
    """difference = 0."""

    difference: Node


@dataclass(frozen=True)
class Interval:
    """End points (None: infinite) and whether they belong to it."""

    low: Node | None
    high: Node | None
    has_low: bool
    has_high: bool


@dataclass(frozen=True)
class Reals:
    """A union of intervals. variable: the letter that an inequality names."""

    parts: tuple[Interval, ...]
    variable: str | None = None


@dataclass(frozen=True)
class Ratio:
    terms: tuple[Node, ...]


@dataclass(frozen=True)
class Falsehood:
    """5 = 6: wrong whatever the question."""


Answer = Expression | Words | Many | Matrix | Numeral | Named | Equation | Reals | Ratio | Falsehood

EVERYTHING = Reals((Interval(None, None, False, False),))
_OPEN, _CLOSE = ("(", "[", r"\{", r"\langle", "{"), (")", "]", r"\}", r"\rangle", "}")
_PIECE = re.compile(r"\\begin\{[a-z*]+\}|\\end\{[a-z*]+\}|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_RELATION = ("=", "<", ">", r"\le", r"\ge", r"\ne", r"\in")
_NUMBER_WORDS = dict(
    zip("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split(), range(17), strict=True)
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_UNITS = {
    **dict.fromkeys(("dollar", "usd", "buck"), "dollar"),
    **dict.fromkeys(("in", "inch", "inche"), "inch"),
    **dict.fromkeys(("ft", "feet", "foot"), "foot"),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), "cm"),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), "mm"),
    **dict.fromkeys(("m", "meter", "metre"), "m"),
    **dict.fromkeys(("km", "kilometer", "kilometre"), "km"),
    **dict.fromkeys(("mi", "mile"), "mile"),
    **dict.fromkeys(("yd", "yard"), "yard"),
    **dict.fromkeys(("s", "sec", "second"), "second"),
    **dict.fromkeys(("min", "minute"), "minute"),
    **dict.fromkeys(("h", "hr", "hour"), "hour"),
    **dict.fromkeys(("kg", "kilogram"), "kg"),
    **dict.fromkeys(("g", "gram"), "g"),
    **dict.fromkeys(("lb", "pound"), "pound"),
    **dict.fromkeys(("oz", "ounce"), "ounce"),
    **dict.fromkeys(("l", "liter", "litre"), "liter"),
    **dict.fromkeys(("ml", "milliliter"), "ml"),
    **dict.fromkeys(("mph",), "mile/hour"),
    **dict.fromkeys(("rad", "radian"), "radian"),
    **dict.fromkeys(("unit",), "unit"),
}
_BARE_UNITS = frozenset(_UNITS) | {"cent", "euro", "yen", "rupee", "inches", "day", "week", "month", "year", "way", "people"}
_BASE_WORD = r"(?:\\text\{\s*(?:\(?base )?([a-z]+|\d+)\)?\s*\}|\{?\s*(\d+)\s*\}?|\{\s*\\text\{\s*(?:base )?([a-z]+|\d+)\s*\}\s*\})"
_NUMERAL = re.compile(rf"\(?(?:\\text\{{)?([0-9A-F]+)\}}?\)?\s*_\s*{_BASE_WORD}")
_NUMERAL_IN_WORDS = re.compile(r"([0-9A-F]+)\s*\(?(?:\\text\{\s*)?\(?(?:in )?base[ -]*\}?\s*_?([a-z]+|\d+)\s*\)?\}?\)?")
_UNIT_AT_END = re.compile(
    r"(?:\\text\{(?P<text>[^{}]*)\}|(?<=[\d}) ])(?P<bare>(?:(?:square|cubic|sq|cu)\.? )?[a-zA-Z]{1,12}(?:(?:\s*/\s*| per | )[a-zA-Z]{1,12})?)\.?)"
    r"\s*(?:\^\s*\{?\s*(?P<power>[23])\s*\}?)?$"
)
_UNIT_IN_FRONT = re.compile(r"(-?)\s*\\text\{(dollars|euros|pounds|yen|rupees|cents|USD)\}\s*(?=[\d.\\(-])")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_LEADING_ZERO = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})*,0\d{2}(?:,\d{3})*(?![\d,])")
_MATRIX = re.compile(r"[(\[]?\s*\\begin\{(?:[pbBvV]?matrix|smallmatrix|array)\}(?:\{[clr| ]*\})?(.*)\\end\{(?:[pbBvV]?matrix|smallmatrix|array)\}\s*[)\]]?$", re.DOTALL)
_LABEL = re.compile(r"\s*(?:\\text\{[^{}]*\}|[a-zA-Z]|\\[a-zA-Z]+)(?:_\s*(?:\{[^{}]*\}|\w))?'*\s*(?:\(\s*[^()=]*\s*\))?(?:\s*\\text\{[^{}]*\})?\s*")
_FORMULA = re.compile(r"\$([^$]+)\$|\\\(((?:[^\\]|\\[^)])+)\\\)")
_POINT_LABEL = re.compile(r"\(\s*[a-zA-Z](?:_\w)?(?:\s*,\s*[a-zA-Z](?:_\w)?)+\s*\)")


def read(text: str, thousands: bool = True) -> Answer:
    """The answer as a thing to compare. thousands: whether 1,234 is one number. UnreadableError."""
    if len(text) > LONGEST:
        raise UnreadableError("too long")
    return _read(_grouped(plain(text)) if thousands else plain(text))


def reads_as_mathematics(text: str) -> bool:
    """Whether a text is an answer other than words."""
    try:
        return not isinstance(read(text), Words)
    except (UnreadableError, RecursionError):
        return False


def last_formula(text: str) -> str:
    """The last `$...$` or `\\(...\\)` of a text that is no answer as a whole; else the text."""
    formulas = _FORMULA.findall(text[-LONGEST:])
    if not formulas or reads_as_mathematics(text):
        return text
    return next(part for part in formulas[-1] if part)


def words_of(text: str) -> str:
    """Letters and digits of an answer, in lower case, without articles: what it says."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", plain(text))
    text = text.replace(r"\land", "and").replace(r"\lor", "or").replace(r"^\circ", "degrees").lower()
    text = re.sub(r"^(?:an?|the)\s+", "", text.strip(" .,;:!\"'*`()"))
    return re.sub(r"[^\w+\-/<>=^]|_", "", text)


def _grouped(text: str) -> str:
    """Without the commas of 1,234 outside of brackets, and of 1,050 inside of them, where nobody lists 1 and 050."""
    text = _LEADING_ZERO.sub(lambda m: m[0].replace(",", ""), text)
    out, depth = [], 0
    for chunk in re.split(r"(\\\{|\\\}|[()\[\]])", text):
        if chunk in ("(", "[", r"\{"):
            depth += 1
        elif chunk in (")", "]", r"\}"):
            depth -= 1
        elif depth == 0:
            chunk = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), chunk)
        out.append(chunk)
    return "".join(out)


def _split(text: str, separators: tuple[str, ...]) -> list[tuple[str, str]]:
    """(separator in front, piece) of the text, cut where no bracket is open."""
    pieces, depth, separator, start = [], 0, "", 0
    for match in _PIECE.finditer(text):
        token = match.group()
        if token in _OPEN or token.startswith(r"\begin"):
            depth += 1
        elif token in _CLOSE or token.startswith(r"\end"):
            depth -= 1
        elif depth == 0 and token in separators:
            pieces.append((separator, text[start : match.start()].strip()))
            separator, start = token, match.end()
    if depth != 0:
        raise UnreadableError("brackets do not match")
    return [*pieces, (separator, text[start:].strip())]


def _read(text: str) -> Answer:
    if not text:
        raise UnreadableError("nothing")
    if text in (r"\emptyset", r"\{\}", r"\{ \}", "{}"):
        return Many("set", ())
    if text.replace(" ", "") in (r"\infty", r"+\infty", r"-\infty"):
        return Words("-infinity" if "-" in text else "infinity")
    if text == r"\mathbb{R}":
        return EVERYTHING
    if text.startswith(r"\text{") and (match := re.fullmatch(r"\\text\{([^{}]*)\}", text)):
        return _words(match[1])
    if (numeral := _numeral(text)) is not None:
        return numeral
    if len(connected := _split(text, (r"\lor", r"\land", ";"))) > 1 or (len(connected := _split(text, (",",))) > 1):
        return _connected(connected)
    if _split(text, _RELATION)[1:]:
        return _relation(text)
    if len(united := _split(text, (r"\cup", r"\setminus"))) > 1:
        return _union(united)
    if (bracketed := _bracketed(text)) is not None:
        return bracketed
    if any(sign in text for sign in (r"\pm", r"\mp")):
        return _listed([_read(one) for one in _signed(text)], "list")
    if match := _MATRIX.match(text):
        rows = [row for _, row in _split(match[1].strip(), (r"\\", r"\cr"))]
        rows = [row for row in rows if row and row != r"\hline"]
        return Matrix(tuple(tuple(_read(cell) for _, cell in _split(row, ("&",))) for row in rows))
    if len(terms := _split(text, (":",))) > 1:
        return Ratio(tuple(parse(term) for _, term in terms))
    return _expression(text)


def _words(content: str) -> Answer:
    key = words_of(rf"\text{{{content}}}")
    if key in _NUMBER_WORDS:
        return Expression(number(_NUMBER_WORDS[key]))
    if key in ("nosolution", "nosolutions", "emptyset", "nosuchnumber"):
        return Many("set", ())
    if key in ("allrealnumbers", "allreals", "allrealnumber"):
        return EVERYTHING
    if re.fullmatch(r"\d+", key):
        return Expression(number(int(key)))
    if not key:
        raise UnreadableError("no words")
    return Words(key)


def _numeral(text: str) -> Numeral | None:
    match = _NUMERAL.fullmatch(text) or _NUMERAL_IN_WORDS.fullmatch(text)
    if match is None:
        return None
    name = next(group for group in match.groups()[1:] if group)
    base = int(name) if name.isdigit() and len(name) < 4 else _NUMBER_WORDS.get(name, 0)
    base = {"binary": 2, "octal": 8, "decimal": 10, "hexadecimal": 16}.get(name, base)
    if not 2 <= base <= 36 or not (match[1][0].isdigit() or base > 10) or any(int(digit, 36) >= base for digit in match[1]):
        return None
    return Numeral(match[1].lstrip("0") or "0", base)


def _connected(pieces: list[tuple[str, str]]) -> Answer:
    """Answers joined by commas and words. Inequalities: "and" and a comma mean both hold, "or" that one does."""
    pieces = [(separator, piece) for separator, piece in pieces if piece]
    if len(pieces) == 1:
        return _read(pieces[0][1])
    if not pieces:
        raise UnreadableError("only commas")
    answers = [_read(piece) for _, piece in pieces]
    if any(isinstance(answer, Reals) for answer in answers):
        if not all(isinstance(answer, Reals) for answer in answers) or any(separator == r"\land" for separator, _ in pieces):
            raise UnreadableError("an intersection")
        names = {answer.variable for answer in answers}
        return Reals(tuple(part for answer in answers for part in answer.parts), names.pop() if len(names) == 1 else None)
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


def _signed(text: str) -> list[str]:
    """The text with every choice of its signs; with minus-plus among them, all signs go together."""
    count = text.count(r"\pm") + text.count(r"\mp")
    if count > 3:
        raise UnreadableError("too many signs")
    together = r"\mp" in text
    choices = [(first,) * count for first in "+-"] if together else list(itertools.product("+-", repeat=count))
    results = []
    for choice in choices:
        signs = iter(choice)
        results.append(re.sub(r"\\(pm|mp)(?![a-zA-Z])", lambda m: _sign(m[1], next(signs)), text))  # noqa: B023
    return results


def _sign(command: str, choice: str) -> str:
    return choice if command == "pm" else {"+": "-", "-": "+"}[choice]


def _bracketed(text: str) -> Answer | None:
    """(a, b), [a, b), {a, b}, \\langle a, b \\rangle; None if the text is not one pair of brackets with a comma inside."""
    left = next((bracket for bracket in (r"\{", r"\langle", "(", "[", "]", "{") if text.startswith(bracket)), None)
    right = next((bracket for bracket in (r"\}", r"\rangle", ")", "]", "[", "}") if text.endswith(bracket)), None)
    if left is None or right is None or len(text) < len(left) + len(right):
        return None
    body = text[len(left) : -len(right)].strip()
    if (left, right) == ("{", "}") and len(_split(body, (",",))) > 1:  # as a model types it
        left, right = r"\{", r"\}"
    try:
        pieces = [piece for _, piece in _split(body, (",", ";"))]
        if left == r"\{" and len(builder := _split(body, ("|", ":"))) == 2:
            return _read(builder[1][1])
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
        return _listed([_read(left + one + right) for one in _signed(body)], "list")
    return Many("square" if left == "[" else "point", tuple(_read(piece) for piece in pieces))


def _unnamed(answer: Answer) -> Answer:
    return answer.value if isinstance(answer, Named) else answer


def _refuse(reason: str) -> Answer:
    raise UnreadableError(reason)


def _interval(pieces: list[str], has_low: bool, has_high: bool) -> Interval:
    if len(pieces) != 2:
        raise UnreadableError("an interval of more than two ends")
    ends = [_end(piece, sign) for piece, sign in zip(pieces, "-+", strict=True)]
    return Interval(*ends, has_low and ends[0] is not None, has_high and ends[1] is not None)


def _end(text: str, sign: str) -> Node | None:
    if r"\infty" in text:
        if text.replace(" ", "") not in ((r"-\infty",) if sign == "-" else (r"\infty", r"+\infty")):
            raise UnreadableError("an infinity on the wrong side")
        return None
    return parse(text)


def _union(pieces: list[tuple[str, str]]) -> Reals:
    parts: list[Interval] = []
    for separator, piece in pieces:
        more = as_reals(_read(piece))
        if more is None:
            raise UnreadableError("a union of other things")
        if separator == r"\setminus":
            if parts != list(EVERYTHING.parts) or not all(part.low == part.high is not None for part in more.parts):
                raise UnreadableError("a difference of sets")
            parts = list(without_points([part.low for part in more.parts]).parts)
        else:
            parts += more.parts
    return Reals(tuple(parts))


def without_points(points: list[Node]) -> Reals:
    """All reals but these, which need not be in order: as a union, that is one interval if there is one point."""
    if len(points) != 1:
        from .values import sign

        points = sorted(points, key=_by(sign))
    ends = [None, *points, None]
    return Reals(tuple(Interval(low, high, False, False) for low, high in itertools.pairwise(ends)))


def _by(sign):
    import functools

    return functools.cmp_to_key(lambda a, b: sign(Node("+", (a, Node("*", (number(-1), b))))))


def as_reals(answer: Answer) -> Reals | None:
    """The answer as a set of reals: (1, 2) is an open interval, {1, 2} two points. None if it is none."""
    if isinstance(answer, Reals):
        return answer
    if isinstance(answer, Many) and all(isinstance(item, Expression) for item in answer.items):
        nodes = [item.node for item in answer.items]
        if answer.kind == "set":
            return Reals(tuple(Interval(node, node, True, True) for node in nodes))
        if answer.kind in ("point", "square") and len(nodes) == 2:
            closed = answer.kind == "square"
            return Reals((Interval(nodes[0], nodes[1], closed, closed),))
    return None


def _relation(text: str) -> Answer:
    pieces = _split(text, _RELATION)
    relations = [relation for relation, _ in pieces[1:]]
    sides = [side for _, side in pieces]
    if not all(sides):
        raise UnreadableError("a relation without a side")
    if relations == [r"\in"]:
        inner = _read(sides[1])
        reals = inner if isinstance(inner, Reals) else as_reals(inner) if isinstance(inner, Many) and inner.kind != "set" else None
        return Reals(reals.parts, sides[0]) if reals is not None else Named(sides[0], inner)
    if set(relations) == {"="}:
        return _equality(sides)
    if relations == [r"\ne"] and _is_variable(sides[0]):
        answer = _read(sides[1])
        points = answer.items if isinstance(answer, Many) and answer.kind == "list" else (answer,)
        if not all(isinstance(point, Expression) for point in points):
            raise UnreadableError("unequal to what is no number")
        return Reals(without_points([point.node for point in points]).parts, sides[0])
    return _inequality(sides, relations)


def _is_variable(text: str) -> bool:
    return re.fullmatch(r"[a-zA-Z](?:_\s*(?:\w|\{\w+\}))?|\\(?:theta|alpha|beta|lambda|mu|phi)", text.strip()) is not None


def _equality(sides: list[str]) -> Answer:
    if _LABEL.fullmatch(sides[-1]) and len(sides) == 2 and not _LABEL.fullmatch(sides[0]) and _is_variable(sides[-1]):
        sides = sides[::-1]  # 5 = x
    name = None
    if (_LABEL.fullmatch(sides[0]) and sides[0] not in ("e", "i", r"\pi", r"\infty")) or _POINT_LABEL.fullmatch(sides[0]):
        name = re.sub(r"\\text\{([^{}]*)\}|\s", r"\1", sides[0])
        sides = sides[1:]
    elif re.fullmatch(r"[^=]*\\text\{[^{}]*\}[^=]*", sides[0]) and not re.match(r"[\d(\\]", sides[0].replace(r"\text", "")):
        name, sides = "", sides[1:]
    if name is not None:
        for left, right in itertools.pairwise(sides):
            if _contradict(left, right):
                return Falsehood()
        return Named(name, _read(sides[-1]))
    nodes = [parse(_without_unit(side)[0]) for side in sides]
    if not any(node.symbols() for node in nodes):
        return Falsehood() if any(_contradict(left, right) for left, right in itertools.pairwise(sides)) else _read(sides[-1])
    if len(nodes) != 2:
        raise UnreadableError("a chain of equations")
    return Equation(Node("+", (nodes[0], Node("*", (number(-1), nodes[1])))))


def _contradict(left: str, right: str) -> bool:
    """Whether two sides that are numbers are not the same one."""
    from .compare import same

    try:
        a, b = _read(left), _read(right)
    except UnreadableError:
        return False
    if not all(isinstance(side, Expression) and not side.node.symbols() for side in (a, b)):
        return False
    return same(a, b) is False


_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def _inequality(sides: list[str], relations: list[str]) -> Reals:
    """x < a, a < x, a < x <= b and the like, for a letter x."""
    if relations[0] in (">", r"\ge") and len(sides) == 3:
        sides, relations = sides[::-1], [_FLIPPED.get(relation, "") for relation in relations[::-1]]
    if len(sides) == 2 and not _is_variable(sides[0]):
        sides, relations = sides[::-1], [_FLIPPED.get(relations[0], "")]
    if len(sides) == 2 and _is_variable(sides[0]) and relations[0] in _FLIPPED:
        end = parse(sides[1])
        if relations[0] in (">", r"\ge"):
            part = Interval(end, None, relations[0] == r"\ge", False)
        else:
            part = Interval(None, end, False, relations[0] == r"\le")
        return Reals((_constant(part),), sides[0])
    if len(sides) == 3 and _is_variable(sides[1]) and set(relations) <= {"<", r"\le"}:
        ends = [_end(side, sign) for side, sign in zip((sides[0], sides[2]), "-+", strict=True)]
        has = [relation == r"\le" and end is not None for relation, end in zip(relations, ends, strict=True)]
        return Reals((_constant(Interval(*ends, *has)),), sides[1])
    raise UnreadableError("an inequality of more than a letter and numbers")


def _constant(part: Interval) -> Interval:
    if any(end is not None and end.symbols() for end in (part.low, part.high)):
        raise UnreadableError("an inequality of several letters")
    return part


def _expression(text: str) -> Answer:
    text, unit = _without_unit(text)
    if _is_prose(text):
        return _words(text)
    return Expression(parse(text), unit)


def _is_prose(text: str) -> bool:
    """Words that were typed without \\text: no operator, and letters in a run that no product of symbols has."""
    runs = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", re.sub(r"\\text\{[^{}]*\}", " word ", text))
    if not re.fullmatch(r"(?:[\w\s.,'!?\-:&/()\"]|\\text\{[^{}]*\})*", text) or "_" in text:
        return False
    return any(len(run) >= 4 or run[0].isupper() and run[1:].islower() or (len(run) == 3 and run.lower() in _SHORT_WORDS) for run in runs) or (
        bool(re.fullmatch(r"(?i)no|yes", text.strip(" .!")))
    )


_SHORT_WORDS = frozenset("yes odd all the red blue tie few six two one ten even east west july june may sat sun mon tue wed thu fri".split())


def _without_unit(text: str) -> tuple[str, str | None]:
    """(the rest, unit or None): 5 cm, $5, 5 million dollars is (5) 1000000, dollar."""
    unit = None
    if match := _UNIT_IN_FRONT.match(text):
        unit, text = _unit_name(match[2], None), match[1] + text[match.end() :]
    while match := _UNIT_AT_END.search(text):
        rest = text[: match.start()].rstrip().removesuffix(r"\cdot").rstrip()
        if not re.search(r"[\d)}\]!%]$|\\pi$|\\circ$|[a-z]$", rest) or rest.endswith(("^", "_")):
            break
        if match["bare"] is not None and not _is_bare_unit(match["bare"], text[: match.start()]):
            break
        name = match["text"] if match["text"] is not None else match["bare"]
        first, _, others = name.strip().partition(" ")
        if first.lower().removesuffix("s") in _SCALES and not match["power"]:
            text = rf"({rest})\cdot {_SCALES[first.lower().removesuffix('s')]}"
            unit = _unit_name(others.removeprefix("of "), None) if others else unit
            continue
        unit, text = _unit_name(name, match["power"]), rest
    return text, unit


def _is_bare_unit(name: str, before: str) -> bool:
    words = [word for word in re.split(r"[\s/.]+", name.lower()) if word]
    known = all(_singular(word) in _BARE_UNITS or word in _SCALES or word in ("square", "cubic", "sq", "cu", "per") for word in words)
    single = len(name) == 1
    if known and not single:
        return True
    return not single and before.endswith(" ") and all(len(word) >= 4 for word in words) and re.search(r"\d\s*$", before) is not None


def _singular(word: str) -> str:
    return word if word in _UNITS or len(word) < 3 else word.removesuffix("s")


def _unit_name(name: str, power: str | None) -> str | None:
    """One spelling for a unit: `square inches`, `sq. in.` and `inches^2` are inch^2."""
    name = re.sub(r"[^a-z0-9/^ ]", " ", name.lower()).replace(" per ", "/")
    prefix = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
    words = [word for word in re.split(r"\s+|(/)|\^", name) if word]
    power = next((prefix[word] for word in words if word in prefix), power)
    kept = [_UNITS.get(_singular(word), _singular(word)) for word in words if word not in prefix and word not in ("the", "of", "a", "an")]
    if not kept or kept == ["unit"]:
        return None
    return "".join(kept) + (f"^{power}" if power else "")
