"""What d1's own scripts say of a text (arXiv 2504.12216, github.com/dllm-reasoning/d1): protocol "d1".

Verdicts are those of its evaluation script, rewards those of its training code; the two read a text differently. Everything here is
their behaviour, odd as it may be, and none of it is a judgement of ours. Two things differ, for safety alone: expressions are
evaluated without Python's eval, and powers beyond `MAX_POWER_BITS` count as wrong.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal

from .task import Grade, chat_answer

MAX_EXPRESSION = 256  # characters
MAX_POWER_BITS = 4096
TOLERANCE = 1e-5

_NUMBER = re.compile(r"-?\d+\.?\d*")
TAGS = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
_SOFT = re.compile(r"</reasoning>\s*<answer>")


# GSM8K


def grade_gsm8k(answer: Decimal, published: str, text: str) -> Grade:
    """Verdict: `gsm8k_number` equals the answer as a float. Reward: the sum of d1's five, of which the 2 for a right answer compares
    strings: "72.0" and "\\boxed{72}" are not "72" there."""
    number = gsm8k_number(text)
    extracted = _last_answer(text)
    form = 0.5 * (is_soft_format(text) + is_strict_format(text) + extracted.isdigit())
    return Grade(
        xml_count(text) + form + 2.0 * (extracted == published), number is not None and number == float(answer)
    )


def gsm8k_number(text: str) -> float | None:
    """The first `\\boxed{}` on one line, up to its first brace, that is or holds a number (its first), else the first `<answer>`
    (its last number)."""
    for content in _first_brace_boxes(text):
        if content and content.strip("."):
            number = _float(content)
            number = _first_number(content) if number is None else number
            if number is not None:
                return number
    answer = _first_answer(text)
    if not answer:
        return None
    number = _float(answer)
    numbers = _NUMBER.findall(answer) if number is None else []
    return _float(numbers[-1]) if numbers else number


def _first_brace_boxes(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        end = 0
        while (start := line.find("\\boxed{", end)) >= 0 and (end := line.find("}", start)) >= 0:
            yield line[start + len("\\boxed{") : end].strip()


def _first_number(text: str) -> float | None:
    match = _NUMBER.search(text)
    return _float(match[0]) if match else None


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def xml_count(text: str) -> float:
    """.125 for each tag that stands exactly once; .001 less for each character after the closing one, and as many for the whole text
    where `\\n</answer>\\n` is missing."""
    reward = 0.125 * sum(text.count(tag) == 1 for tag in TAGS)
    if text.count(TAGS[2]) == 1:
        reward -= 0.001 * len(text.rpartition("\n</answer>\n")[2])
    if text.count(TAGS[3]) == 1:
        reward -= 0.001 * (len(text.rpartition("\n</answer>")[2]) - 1)
    return reward


def is_soft_format(text: str) -> bool:
    """Whether the text begins with complete reasoning, directly followed by a complete answer; both may span lines."""
    between = _SOFT.search(text, len("<reasoning>"))
    return text.startswith("<reasoning>") and between is not None and text.find("</answer>", between.end()) >= 0


def is_strict_format(text: str) -> bool:
    """Whether each tag has a line of its own and the text ends with the last of these lines; both parts may span lines.

    The regular expression's `$` lets one more line end follow.
    """
    first, middle, last = "<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>\n"
    return any(
        text.startswith(first) and body.endswith(last) and body.find(middle, len(first), -len(last)) >= 0
        for body in (text, text.removesuffix("\n"))
    )


# Countdown


def grade_countdown(numbers: Sequence[int], target: int, text: str) -> Grade:
    """Verdict: the expression of `countdown_expression` uses each number once and makes the target within 1e-5.

    Reward: 0 without a complete `<answer>`; 1 if the whole of the last one is such an expression, which a box or "=" is not; else .1.
    """
    answer = chat_answer(text)
    reward = 0.0 if answer is None else 1.0 if _makes(answer, numbers, target) else 0.1
    return Grade(reward, _makes(countdown_expression(text), numbers, target))


def countdown_expression(text: str) -> str:
    """The last `\\boxed{}`, else the first `<answer>`, else the whole text, with `\\div \\times \\cdot` read; of an equation with a
    number on the right, the left side."""
    expression = last_box(text)
    if expression is None:
        expression = _first_answer(text)
    if expression is None:
        expression = text
    for command, sign in ((r"\div", "/"), (r"\times", "*"), (r"\cdot", "*")):
        expression = expression.replace(command, sign)
    for match in re.finditer(r"=[0-9. ]", expression):
        start = match.start()
        while start and expression[start - 1] in "0123456789+-*/() ":
            start -= 1
        if start < match.start():
            return expression[start : match.start()].strip()
    return expression


def last_box(text: str) -> str | None:
    """Content of the last `\\boxed{...}` by counting braces; after `\\boxed ` up to a dollar sign; None if it is never closed."""
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    start, depth = text.rfind("\\boxed{"), 0
    if start < 0 or start < text.rfind("\\boxed"):
        return None
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + len("\\boxed{") : start + brace.start()]
    return None


def _makes(expression: str, numbers: Sequence[int], target: int) -> bool:
    if len(expression) > MAX_EXPRESSION or not re.match(r"^[\d+\-*/().\s]+$", expression):
        return False
    if sorted(map(int, re.findall(r"\d+", expression))) != sorted(numbers):
        return False
    try:
        return abs(_evaluate(ast.parse(expression.strip(), mode="eval").body) - target) < TOLERANCE
    except (SyntaxError, ValueError, ArithmeticError, TypeError, RecursionError, MemoryError):
        return False


_OPERATIONS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def _evaluate(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluate(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        return _OPERATIONS[type(node.op)](left, right)
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def _power(base: float, exponent: float) -> float:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_POWER_BITS:
        raise OverflowError("the power is too large to be a target")
    return base**exponent


# Sudoku


def grade_sudoku(puzzle: str, solution: str, text: str) -> Grade:
    """Reward: the share of the originally empty cells that are right, which d1 reports as accuracy. Verdict: whether all are."""
    cells = sudoku_cells(text)
    right = [given == digit for clue, digit, given in zip(puzzle, solution, cells, strict=True) if clue == "0"]
    return Grade(sum(right) / len(right), all(right))


def sudoku_cells(text: str) -> str:
    """16 characters, padded with 0 or cut, of the first that holds something: a fence of digits after `<answer>`; the first `<answer>`,
    which the end of the text closes too; what follows `</answer>`; 16 digits in front of `</answer>`; any 16 digits."""
    found = next((part for part in _sudoku_parts(text) if part.strip()), "")
    return "".join(found.split())[: len(_NO_CELLS)].ljust(len(_NO_CELLS), "0")


_NO_CELLS = "0" * 16


def _sudoku_parts(text: str) -> Iterator[str]:
    opened, closed = text.find("<answer>"), text.find("</answer>")
    if opened >= 0:
        fence = re.compile(r"```([\d\s]+)```").search(text, opened)
        yield fence[1] if fence else ""
        yield text[opened + len("<answer>") :].partition("</answer>")[0]
    if closed >= 0:
        yield text[closed + len("</answer>") :]
    for pattern in (r"(\d{16})\s*</answer>", r"\b(\d{16})\b"):
        match = re.search(pattern, text)
        yield match[1] if match else ""


def _first_answer(text: str) -> str | None:
    """Content of the first complete `<answer>...</answer>`, stripped."""
    start = text.find("<answer>")
    end = text.find("</answer>", start) if start >= 0 else -1
    return text[start + len("<answer>") : end].strip() if end >= 0 else None


def _last_answer(text: str) -> str:
    """What the training code takes for the answer: after the last `<answer>`, before the next `</answer>`, tags or not."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
