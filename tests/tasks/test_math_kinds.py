"""Kinds of answers that a model writes beside the textbook's: words around numbers, clocks, several boxes, decorations, absurd sizes."""

import pytest

import diffpo
from diffpo.tasks.boxed import last_boxes
from diffpo.tasks.mathematics import UndecidedError, decide

WORDS = [
    ("90", r"\text{There are } 90", True),
    ("90", r"\text{There are 90 ways to do it.}", True),
    ("90", r"There are $90$ ways", True),
    ("90", r"\text{There are } 91", False),
    ("90", r"\text{There are 90 or 91 ways}", False),
    ("90", r"\text{3 boxes of 90 balls}", False),
    ("4", r"\text{4 pieces}", True),
    ("4", r"\text{14 pieces}", False),
    ("4", r"\text{-4 degrees outside}", False),
    ("42", r"\text{The answer is } 42", True),
    ("42", r"\text{The answer is not } 42", False),
    ("1,234", r"\text{There are 1,234 people}", True),
    ("234", r"\text{There are 1,234 people}", False),
    ("3.5", r"\text{about 3.5 hours}", True),
    ("5", r"\text{about 3.5 hours}", False),
    (r"\frac12", r"\text{The probability is } \frac{1}{2}", True),
    (r"\frac12", r"\text{The probability is } \frac{1}{3}", False),
    ("4", r"\text{The probability is 3/4}", False),
    (r"2\pi", r"\text{The circumference is } 2\pi \text{ units}", True),
    ("2", r"\text{The circumference is } 2\pi", False),
    ("5", r"\text{The value of } x \text{ is } 5", True),
    ("5000000", r"\text{There are 5 million people}", True),
    ("5", r"\text{There are 5 million people}", False),
    ("500", r"\text{There are five hundred ways}", True),
    ("1", r"\text{twenty-one}", False),
    ("20", r"\text{twenty}", True),
    ("2", r"\text{two thirds}", False),
    ("100", r"\text{half of 100}", False),
    ("10", r"\text{at most 10}", False),
    ("0.9", r"\text{The chance is 90 percent}", True),
    (r"12\text{ cm}", r"\text{The length is 12 inches}", False),
    (r"12\text{ cm}", r"\text{The length is 12 cm}", True),
    ("5", r"\text{There are 5 in all}", True),
    ("3, 5", r"\text{The solutions are } 3 \text{ and } 5", True),
    ("3, 5", r"\text{5 or 3}", True),
    ("3, 5", r"\text{3 or 6}", False),
    ("(1,2)", r"\text{The point is } (1,2)", True),
    ("(1,2)", r"\text{The point is } (2,1)", False),
    (".35625", r"\text{The answer is } .35625", True),
    ("1.25", r"\text{The answer is 1.25}", True),
    ("125", r"\text{The answer is 1.25}", False),
    ("52_8", r"\text{The answer is 52_8}", True),
    ("52", r"\text{The answer is 52_8}", False),
    (r"\begin{pmatrix} 1 \\ 2\end{pmatrix}", r"\text{The vector is } \begin{pmatrix} 1 \\ 2\end{pmatrix}", True),
    (r"\text{Evelyn}", r"\text{The answer is } \text{Evelyn}", True),
    (r"\text{Evelyn}", r"\text{The answer is } \text{Carla}", False),
    (r"\text{(C)}", r"\text{The answer is (C)}", True),
    (r"\text{(C)}", r"\text{The answer is (D)}", False),
    (r"\text{June 20}", "June 20th", True),
    (r"\text{June 20}", r"\text{June } 20^{\text{th}}", True),
    (r"\text{May 3rd}", r"\text{May 3}", True),
    (r"\text{June 20}", "June 21st", False),
    (r"\text{June 20}", "20", False),
    (r"\text{Yes}", r"\text{Yes, 5}", False),
    (r"\text{Evelyn}", r"\text{Evelyn has 4}", False),
]
NUMERALS = [
    ("4210_{5}", "{4210}_{5}", True),
    ("4210_{5}", "{4210}_{6}", False),
    ("4343_6", "4343_{(6)}", True),
    ("4343_6", "{4343}_{(6)}", True),
    ("4343_6", r"(4343)_{\text{(six)}}", True),
    ("4343_6", "4344_{(6)}", False),
    ("4343_6", "4343_{(7)}", False),
    ("AB_{16}", "{AB}_{(16)}", True),
    ("101_2, 11_3", "{11}_{(3)}, {101}_{(2)}", True),
    ("5", "{5}_{(6)}", False),
]
NAMED_POINTS = [
    (r"(3,\frac{\pi}{2})", r"(r,\theta)=(3,\frac\pi2)", True),
    (r"(3,\frac{\pi}{2})", r"(r,\theta)=(3,\frac\pi3)", False),
    (r"(1,2,3)", r"\left(\rho,\theta,\phi\right)=(1,2,3)", True),
    ("(0,5)", r"(\lambda,\mu_1)=(0,5)", True),
    ("(1,2)", "x, y = 1, 2", True),
    ("(1,2)", "x, y = 2, 1", False),
    ("(1,2)", "x,y=(1,2)", True),
    ("(1,2)", r"\langle u,v\rangle=\langle1,2\rangle", True),
    ("(1,2)", r"(r,\theta)=(1,2,3)", False),
    ("3", "x,y=3", False),
    ("(x,y)=(1,2)", "x=1, y=2", True),
    ("(1,2),(3,4)", "(x,y)=(3,4),(1,2)", True),
]
CLOCKS = [
    ("12:00", "1:00", False),
    ("12:00", "12:00", True),
    ("12:00", "12:00 p.m.", True),
    ("12:00", r"\text{12:00 noon}", True),
    ("3:20", "6:40", False),
    ("3:20", r"3{:}20\text{ PM}", True),
    ("3:20", "03:20", True),
    ("3:20", r"\text{It is 3:20}", True),
    (r"3:20\text{ p.m.}", r"3:20\text{ a.m.}", False),
    (r"3:20\text{ p.m.}", "15:20", True),
    (r"3:20\text{ p.m.}", "3:20", True),
    (r"\text{5:30}", "5:30", True),
    (r"\text{5:30}", "5:31", False),
    ("8:05", "8:5", False),
    ("12:00", r"\frac{12}{1}", False),
    ("2:4", "1:2", True),
    ("1:2", "10:20", True),
    ("5:12", r"\frac{5}{12}", True),
    ("25:12", "50:24", True),
    ("3:4", "4:3", False),
]
DECORATED = [
    ("42", "42\N{IDEOGRAPHIC FULL STOP}", True),
    ("42", "43\N{IDEOGRAPHIC FULL STOP}", False),
    ("42", r"\textcolor{blue}{42}", True),
    ("42", r"\textcolor[rgb]{0,0,1}{42}", True),
    ("42", r"\textcolor{blue}{43}", False),
    ("42", r"\color{red}{42}", True),
    ("42", r"{\color[HTML]{FF0000}42}", True),
    ("42", r"\fcolorbox{red}{white}{42}", True),
    ("(1,2)", r"\colorbox{yellow}{(1,2)}", True),
    (r"\text{Yes}", r"\textcolor{green}{\text{Yes}}", True),
    ("x^2", r"\textcolor{red}{x}^2", True),
    ("2", r"\framebox{2}", True),
    ("2", r"\framebox[1cm][c]{\textcolor{red}{2}}", True),
    ("2", r"\framebox{3}", False),
    ("(-1,6)", "(-1{,}6)", True),
    ("(-1,6)", "(-1{,}7)", False),
    ("(1,5,2)", "(1{,}5{,}2)", True),
    ("-1.6", "(-1{,}6)", True),
    ("1234", "1{,}234", True),
]
REMAINDERS = [
    ("2", r"2^{100000000} \bmod 7", True),
    ("3", r"2^{100000000} \bmod 7", False),
    ("4", r"10^{10^{10}} \bmod 7", True),
    ("4", r"10^{10^{10}} \bmod 11", False),
    ("2", r"5!+1 \bmod 7", True),
    ("1", r"2\cdot3^{100} \mod 7", True),
    ("1", r"7 \bmod 0", False),
]


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"), WORDS + NUMERALS + NAMED_POINTS + CLOCKS + DECORATED + REMAINDERS
)
def test_kinds(gold, answer, verdict):
    assert diffpo.grade("math500", {"problem": "p", "answer": gold}, rf"\boxed{{{answer}}}").correct is verdict


@pytest.mark.parametrize(
    "answer",
    [
        *("9^{9^{9}}", "-9^{9^9}", "9^{9^9}+1", "9^{9^9}-9^{9^8}", "9^{9^{9^{9^9}}}", r"\frac{1}{9^{9^{9^9}}}"),
        *("(10^6)!", "(10^6)!/10^{100}", "((5!)!)!", r"\binom{10^9}{5\cdot10^8}", r"\binom{10^{10^{10}}}{2}"),
        *("1e999999999", "1e-999999999", "10^{10^{10}}", r"\sqrt[3]{10^{10^{10}}}", "0.5^{10^{10}}", r"e^{e^{e^9}}"),
    ],
)
@pytest.mark.parametrize("gold", ["2", "0", r"-\sqrt3", "10^{100}"])
def test_absurd_sizes_differ_from_ordinary_numbers(gold, answer):
    assert decide(gold, answer) is False
    assert decide(answer, gold) is False
    assert decide(f"(1, {gold})", f"(1, {answer})") is False


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1", r"\frac{(10^6)!}{(10^6)!}"),
        ("2", "10^{10^{10}}-10^{10^{10}}+2"),
        ("1", "1+10^{-10^{10}}"),
        ("1000000!", "1000001!"),
        ("3", r"\sin(9^{9^9})"),
        ("x", "9^{9^9}x"),
    ],
)
def test_what_no_bound_decides_stays_undecided(gold, answer):
    with pytest.raises(UndecidedError):
        decide(gold, answer)


@pytest.mark.parametrize(
    ("gold", "text", "verdict"),
    [
        ("3, 5, 7", r"\boxed{3}, \boxed{5}, \boxed{7}", True),
        ("3, 5, 7", r"So $\boxed{7}$, $\boxed{3}$, and $\boxed{5}$.", True),
        ("3, 5, 7", r"<answer>\boxed{3}\text{ and }\boxed{5}\text{ and }\boxed{7}</answer>", True),
        ("3, 5, 7", r"\boxed{3}, \boxed{5}, \boxed{8}", False),
        ("3, 5, 7", r"\boxed{3}, \boxed{5}", False),
        ("3, 5", r"\boxed{3}, \boxed{5}, \boxed{7}", False),
        (r"\{1,2\}", r"x=\boxed{2} or x=\boxed{1}", True),
        (r"1\pm\sqrt2", r"$\boxed{1-\sqrt2}$ and $\boxed{1+\sqrt{2}}$", True),
        ("(1,2),(3,4)", r"\boxed{(3,4)}, \boxed{(1,2)}", True),
        ("1, 2", r"\boxed{5} is wrong. So \boxed{1,2}", True),
        ("1, 2", r"\boxed{1,2}, \boxed{1,2}", True),
        ("7", r"\boxed{3}, \boxed{5}, \boxed{7}", True),
        ("3", r"\boxed{3}, \boxed{5}", False),
        ("(1,2)", r"\boxed{1}, \boxed{2}", False),
    ],
)
def test_boxes_that_follow_one_another_are_a_list(gold, text, verdict):
    assert diffpo.grade("math500", {"problem": "p", "answer": gold}, text).correct is verdict


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (r"\boxed{1} then \boxed{2} and \fbox{3}", ["2", "3"]),
        (r"\boxed 1, \boxed 2", ["1", "2"]),
        (r"\framebox[2cm]{1}; \boxed{2}", ["1", "2"]),
        (r"\boxed{a \boxed{b}}", ["b"]),
        (r"\boxed{1}" + " " * 100 + r"\boxed{2}", ["2"]),
        ("none", []),
    ],
)
def test_last_boxes(text, boxes):
    assert last_boxes(text) == boxes
