"""How d1's scripts read and compare answers to MATH (github.com/dllm-reasoning/d1: eval/parser_helper.py and parse_and_get_acc.py,
diffu-grpo/math500_utils.py and reward_func.py), written from what they do. Strings are compared, after the normalisation of the MATH paper's
authors (arXiv 2103.03874): 0.5 is \\frac{1}{2}, and 0.25 is not \\frac{1}{4}.
"""

from __future__ import annotations

import re

_OPEN_BOX = r"\boxed "


def boxed(text: str) -> str | None:
    """What the scripts take for the boxed answer: after the last `\\boxed ` up to a dollar, if there is one; else the last `\\boxed{}`, or the
    last `\\fbox{}` with its command; else the whole text. None if that box is never closed.
    """
    if _OPEN_BOX in text:
        return text[text.rindex(_OPEN_BOX) + len(_OPEN_BOX) :].partition("$")[0]
    start = text.rfind(r"\boxed")
    start = text.rfind(r"\fbox") if start < 0 else start
    if start < 0:
        return text
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if brace[0] == "}" and depth == 0:
            box = text[start : brace.end()]
            return box[len(r"\boxed{") : -1] if box.startswith(r"\boxed{") else box
    return None


def final_answer(text: str) -> str | None:
    """The answer that the evaluation reads: the box, or the first `<answer>` where the box is empty or never closed."""
    answer = boxed(text)
    if not answer:
        start = text.find("<answer>")
        end = text.find("</answer>", start)
        if 0 <= start < end:
            return text[start + len("<answer>") : end].strip()
    return answer


def is_correct(gold: str, text: str) -> bool:
    """The evaluation's verdict."""
    answer = final_answer(text)
    return answer is not None and equivalent(answer, gold)


def reward(gold: str, text: str) -> float:
    """The training reward: 2 if the box, or the whole text where the box is never closed, equals the answer; and for the format 1, .75, .5
    or .25, with `\\boxed` inside of the first `<answer>` (closed or not), without, and the same without any `<answer>`.

    Those four are the published values. The code means the same, but looks for a backspace where it should for a backslash, and so never
    finds a box: it gives .75 and .25.
    """
    answer = boxed(text)
    correct = equivalent(text if answer is None else answer, gold)
    before, tag, after = text.partition("<answer>")
    inside = after.partition("<answer>")[0].partition("</answer>")[0] if tag else before
    return 2.0 * correct + 0.5 * bool(tag) + (0.5 if r"\boxed" in inside else 0.25)


def equivalent(a: str, b: str) -> bool:
    """Whether two answers are the same string once normalised; where one cannot be, as they stand."""
    try:
        return _normalised(a) == _normalised(b)
    except ValueError:
        return a == b


def _normalised(text: str) -> str:
    for old, new in (
        ("\n", ""),
        (r"\!", ""),
        (r"\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        (r"\left", ""),
        (r"\right", ""),
    ):
        text = text.replace(old, new)
    for dropped in (r"^{\circ}", r"^\circ", r"\$"):
        text = text.replace(dropped, "")
    text, *units = text.split(r"\text{ ")
    if len(units) > 1:
        raise ValueError("more than one unit")
    for old, new in ((r"\%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(old, new)
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    text = _braced(text, r"\sqrt", 1).replace(" ", "")
    text = _braced(text, r"\frac", 2)
    return _fraction(r"\frac{1}{2}" if text == "0.5" else text)


def _braced(text: str, command: str, arguments: int) -> str:
    """With braces around the arguments of one character; as it was if a fraction ends too early. ValueError for a command at the end."""
    first, *pieces = text.split(command)
    done = [first]
    for piece in pieces:
        if not piece:
            raise ValueError(f"{command} without an argument")
        if piece[0] == "{":
            done.append(piece)
        elif arguments == 1:
            done.append(f"{{{piece[0]}}}{piece[1:]}")
        elif len(piece) < 2:
            return text
        elif piece[1] == "{":
            done.append(f"{{{piece[0]}}}{piece[1:]}")
        else:
            done.append(f"{{{piece[0]}}}{{{piece[1]}}}{piece[2:]}")
    return command.join(done)


def _fraction(text: str) -> str:
    """a/b of two whole numbers as \\frac{a}{b}. ValueError, as int() has it, for one slash between other things."""
    if text.count("/") != 1:
        return text
    numerator, denominator = map(int, text.split("/"))
    return rf"\frac{{{numerator}}}{{{denominator}}}" if text == f"{numerator}/{denominator}" else text
