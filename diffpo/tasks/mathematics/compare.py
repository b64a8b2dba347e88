"""Whether two answers say the same, by exact arithmetic and numbers to as many digits as it takes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from .approximate import agree
from .bounds import certainly_differ
from .kinds import (
    Answer,
    Clock,
    Equation,
    Expression,
    Falsehood,
    Inequality,
    Many,
    Matrix,
    Named,
    Numeral,
    Ratio,
    Reals,
    Words,
)
from .nodes import Node, UnreadableError, minus, number, symbol
from .plain import PROSE, plain, typeset
from .prose import values_among_words
from .reading import LONGEST, read
from .reals import as_reals, is_solution, same_reals
from .units import words_of
from .values import TooLargeError, UndefinedError, constant_ratio, equal_functions, equal_numbers, start_work

_NUMERAL = re.compile(r"[0-9)}]\s*_|[\u2080-\u2089]")
_RELATION = re.compile(  # math-verify drops it and takes what follows for the answer
    r"^\s*(?:[=<>]|\\(?:ne|le|ge|in)(?![a-zA-Z]))"
    r"|\\(?:not|notin|ni|neg|lnot|n?sim|n?cong|n[lg]eq?|ll|gg|propto|perp|n?parallel|n?mid|prec(?:eq)?|succ(?:eq)?)(?![a-zA-Z])"
)
_LONGEST_UNREADABLE = 300


class UndecidedError(Exception):
    """Too large to be compared, here or by anybody."""


def decide(gold: str, answer: str) -> bool | None:
    """Whether two answers in LaTeX are equal; None if they cannot be read here.

    UndecidedError if a number is too large to be computed and no bound tells it from the other, or telling two apart takes too much work. An answer is wrong if it has more than 2,000
    characters, or more than 300 that cannot be read here.
    """
    if gold.strip() == answer.strip():
        return True
    if not answer.strip() or len(answer) > LONGEST:
        return False
    start_work()
    try:
        return _decided(gold, answer)
    except (UnreadableError, UndefinedError, RecursionError):
        has_base = _NUMERAL.search(gold) or _NUMERAL.search(answer)  # which math-verify does not see
        if has_base or len(answer) > _LONGEST_UNREADABLE or (_relates(answer) and not _relates(gold)):
            return False
        return None
    except TooLargeError:
        raise UndecidedError(answer[:80]) from None


def _relates(text: str) -> bool:
    return _RELATION.search(plain(text)) is not None


def _decided(gold: str, answer: str) -> bool | None:
    expected = read(gold)
    if isinstance(expected, Words):
        return _says(expected.key, answer)
    if len(sides := typeset(answer).split(r"\approx")) > 1:  # 2\sqrt2 \approx 2.83: exact, or as the answer has it
        values = [read(side) for side in sides if side.strip()]
        return agree(values) and _any(same(expected, value) for value in values)
    try:
        given = read(answer)
    except UnreadableError:
        if _is_said(expected, answer):
            return True
        raise
    if _has_words(given) and _is_said(expected, answer):
        return True
    verdict = same(expected, given)
    if not verdict and isinstance(_value(expected), Many | Reals):  # the list 100,200 is no number
        verdict = same(expected, read(answer, thousands=False)) or verdict
    return verdict


def _says(key: str, answer: str) -> bool:
    """Whether an answer says these words, or names this choice: (C), C, and (C) with what it stands for."""
    said = PROSE.sub("", re.sub(r"\\text\{([^{}]*)\}", r"\1", plain(answer)))  # without "the answer is"
    if key in (words_of(answer), words_of(said)):
        return True
    if len(key) == 1:
        return re.match(rf"[^a-zA-Z]*(?:\\text\w*\{{)?\s*\(\s*{key}\s*\)", answer, re.IGNORECASE) is not None
    try:
        return read(answer) == Words(key)
    except (UnreadableError, RecursionError, ArithmeticError):
        return False


def _has_words(answer: Answer) -> bool:
    answer = _value(answer)
    return isinstance(answer, Words) or (isinstance(answer, Many) and any(map(_has_words, answer.items)))


def _is_said(gold: Answer, answer: str) -> bool:
    """Whether an answer says the value among words: all that is mathematics in it is this, or these are the items."""
    try:
        values = [read(value) for value in values_among_words(answer)]
    except UnreadableError:
        return False
    if isinstance(_value(gold), Many) and len(values) > 1:
        return same(gold, Many("list", tuple(values))) is True
    return bool(values) and all(same(gold, value) is True for value in values)


def _value(answer: Answer) -> Answer:
    return answer.value if isinstance(answer, Named) else answer


def same(gold: Answer, answer: Answer) -> bool | None:
    """Whether two answers are equal, None if that is not known here. TooLargeError."""
    if isinstance(gold, Falsehood) or isinstance(answer, Falsehood):
        return False
    if isinstance(gold, Named) or isinstance(answer, Named):
        return _same_named(gold, answer)
    if isinstance(gold, Equation) or isinstance(answer, Equation):
        if (
            isinstance(gold, Expression) and isinstance(answer, Equation) and answer.value is not None
        ):  # x + y = 7 for 7
            return _same_expression(gold, Expression(answer.value))
        return _same_equation(gold, answer)
    if isinstance(gold, Inequality) or isinstance(answer, Inequality):
        return _same_inequality(gold, answer)
    if isinstance(gold, Numeral) or isinstance(answer, Numeral):
        return _same_numeral(gold, answer)
    if isinstance(gold, Clock) or isinstance(answer, Clock):
        return _same_clock(gold, answer)
    if isinstance(gold, Ratio) or isinstance(answer, Ratio):
        return _same_ratio(gold, answer)
    if isinstance(gold, Words) or isinstance(answer, Words):
        return _key(gold) == _key(answer)
    if isinstance(gold, Reals) or isinstance(answer, Reals):
        return same_reals(as_reals(gold), as_reals(answer))
    if isinstance(gold, Matrix) or isinstance(answer, Matrix):
        return _same_matrix(gold, answer)
    if isinstance(gold, Many) or isinstance(answer, Many):
        return _same_many(gold, answer)
    return _same_expression(gold, answer)


def _key(answer: Answer) -> str | None:
    """What words say; a capital letter may be a choice."""
    if isinstance(answer, Expression) and answer.node.kind == "symbol" and answer.node.name.isupper():
        return answer.node.name.lower()
    return answer.key if isinstance(answer, Words) else None


def _or_unknown(test: Callable[[Node, Node], bool | None], a: Node, b: Node) -> bool | None:
    try:
        return test(a, b)
    except UndefinedError:
        return False


def _same_expression(gold: Expression, answer: Expression) -> bool | None:
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    gold_nodes, answer_nodes = _readings(gold.node), _readings(answer.node)
    if len(gold_nodes) == len(answer_nodes) == 2:
        gold_nodes, answer_nodes = gold_nodes[:1], answer_nodes[:1]
    return _any(_same_node(a, b) for a in gold_nodes for b in answer_nodes)


def _readings(node: Node) -> list[Node]:
    """The node as it is, and, where degrees or per cent stand outside of functions, with these taken for a unit that may be left out."""
    bare = _without(node)
    nodes = [node] if bare == node else [node, bare]
    if "log" in node.kinds():  # base 10 in schools, base e elsewhere
        nodes += [_natural(one) for one in nodes]
    return nodes


def _without(node: Node) -> Node:
    if node.kind in ("deg", "%"):
        return node.args[0]
    if node.kind in ("+", "*", "inverse"):
        return replace(node, args=tuple(_without(arg) for arg in node.args))
    return node


def _natural(node: Node) -> Node:
    kind = "ln" if node.kind == "log" and len(node.args) == 1 else node.kind
    return replace(node, kind=kind, args=tuple(_natural(arg) for arg in node.args))


def _same_node(a: Node, b: Node) -> bool | None:
    if a == b:
        return True
    if a.symbols() or b.symbols():
        return _or_unknown(equal_functions, a, b)
    try:
        return _or_unknown(equal_numbers, a, b)
    except TooLargeError:
        if certainly_differ(a, b):
            return False
        raise


def _same_named(gold: Answer, answer: Answer) -> bool | None:
    if isinstance(gold, Named) and isinstance(answer, Named):
        if gold.name == answer.name or not gold.name or not answer.name or len(gold.name) > 3 or len(answer.name) > 3:
            return same(gold.value, answer.value)
        return _same_equation(gold, answer)
    if isinstance(gold, Equation) or isinstance(answer, Equation):
        return _same_equation(gold, answer)
    if isinstance(gold, Many) and gold.kind == "list" and len(gold.items) == 1:
        gold = gold.items[0]
    return same(_value(gold), _value(answer))


def _same_equation(gold: Answer, answer: Answer) -> bool | None:
    a, b = _difference(gold), _difference(answer)
    return a is not None and b is not None and _or_unknown(constant_ratio, a, b)


def _difference(answer: Answer) -> Node | None:
    if isinstance(answer, Equation):
        return answer.difference
    if (
        isinstance(answer, Named)
        and isinstance(answer.value, Expression)
        and re.fullmatch(r"[a-zA-Z](?:_\w)?", answer.name)
    ):
        return minus(symbol(answer.name), answer.value.node)
    return None


def _same_inequality(gold: Answer, answer: Answer) -> bool | None:
    if isinstance(gold, Inequality) and isinstance(answer, Inequality):
        return gold.strict == answer.strict and constant_ratio(gold.positive, answer.positive, positive=True)
    if isinstance(gold, Inequality):
        return _is_solved_by(gold, answer)
    return isinstance(answer, Inequality) and _is_solved_by(answer, gold)


def _is_solved_by(inequality: Inequality, answer: Answer) -> bool | None:
    reals = as_reals(answer)
    return reals is not None and is_solution(inequality, reals)


def _same_numeral(gold: Answer, answer: Answer) -> bool:
    """Digits and base; where only the question named the base, the digits. A numeral in base ten is its number."""
    if isinstance(gold, Numeral) and isinstance(answer, Numeral):
        return gold == answer
    if isinstance(gold, Numeral):
        return (
            isinstance(answer, Expression)
            and answer.unit is None
            and _same_node(number(_digits_as_decimal(gold)), answer.node) is True
        )
    return (
        isinstance(answer, Numeral)
        and answer.base == 10
        and isinstance(gold, Expression)
        and _same_node(gold.node, number(int(answer.digits))) is True
    )


def _digits_as_decimal(numeral: Numeral) -> int:
    return int(numeral.digits) if numeral.digits.isdigit() else -1


def _same_clock(gold: Answer, answer: Answer) -> bool | None:
    """Times of day; beside anything else, 5:12 is a ratio, but 5:00 is not."""
    if isinstance(gold, Clock) and isinstance(answer, Clock):
        if not gold.half and not answer.half:
            return gold == answer
        return bool(gold.minutes() & answer.minutes())
    if any(isinstance(one, Clock) and (one.half or one.minute < 10) for one in (gold, answer)):
        return False
    return same(_ratio(gold), _ratio(answer))


def _ratio(answer: Answer) -> Answer:
    return Ratio((number(answer.hour), number(answer.minute))) if isinstance(answer, Clock) else answer


def _same_ratio(gold: Answer, answer: Answer) -> bool | None:
    terms = [
        one.terms if isinstance(one, Ratio) else (one.node, number(1)) if isinstance(one, Expression) else ()
        for one in (gold, answer)
    ]
    if len(terms[0]) != len(terms[1]) or not terms[0]:
        return False
    a, b = terms
    return _all(_same_node(Node("*", (a[k], b[0])), Node("*", (b[k], a[0]))) for k in range(1, len(a)))


def _same_matrix(gold: Answer, answer: Answer) -> bool | None:
    """Entry by entry; a point is the column, or the row, of its coordinates."""
    gold_rows, answer_rows = (_rows(one, other) for one, other in ((gold, answer), (answer, gold)))
    if gold_rows is None or answer_rows is None or [len(row) for row in gold_rows] != [len(row) for row in answer_rows]:
        return False
    return _all(same(a, b) for a, b in zip(itertools.chain(*gold_rows), itertools.chain(*answer_rows), strict=True))


def _rows(answer: Answer, other: Answer) -> Sequence[Sequence[Answer]] | None:
    if isinstance(answer, Matrix):
        return answer.rows
    if isinstance(answer, Many) and answer.kind in ("point", "square") and isinstance(other, Matrix):
        return [answer.items] if len(other.rows) == 1 else [(item,) for item in answer.items]
    return None


def _same_many(gold: Answer, answer: Answer) -> bool | None:
    """Lists and sets in any order, points in theirs. A list may stand for a set, and for a point in its order."""
    kinds = [one.kind if isinstance(one, Many) else "list" for one in (gold, answer)]
    items = [one.items if isinstance(one, Many) else (one,) for one in (gold, answer)]
    if {"point", "square"} & set(kinds):
        if {len(items[0]), len(items[1])} & {1}:  # {(1, 2)} is one point
            gold, answer = (side[0] if len(side) == 1 else one for side, one in zip(items, (gold, answer), strict=True))
            return same(gold, answer) if isinstance(gold, Many) and isinstance(answer, Many) else False
        if (
            "set" in kinds
            or (set(kinds) == {"point", "square"} and len(items[0]) == 2)
            or len(items[0]) != len(items[1])
            or len(items[0]) < 2
        ):
            return False
        named = [[_value(item) for item in side] for side in items]
        return _all(same(a, b) for a, b in zip(*named, strict=True))
    if "set" in kinds:
        return _matched(_distinct(items[0]), _distinct(items[1]))
    return _matched(items[0], items[1])


def _distinct(items: Sequence[Answer]) -> list[Answer]:
    kept: list[Answer] = []
    for item in items:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return kept


def _matched(gold: Sequence[Answer], answer: Sequence[Answer]) -> bool | None:
    """Whether the items are equal in some order."""
    if len(gold) != len(answer):
        return False
    if len(gold) > 60:
        return None
    left, unknown = list(answer), False
    for item in gold:
        verdicts = [same(item, other) for other in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None in verdicts:
            unknown = True
        else:
            return False
    return None if unknown else True


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    verdicts = list(verdicts)
    return False if False in verdicts else None if None in verdicts else True


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    verdicts = list(verdicts)
    return True if True in verdicts else None if None in verdicts else False
