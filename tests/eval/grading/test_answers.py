"""Reading answers out of text: numbers as exact rationals, the strict and flexible forms, boxes, expressions."""

from fractions import Fraction

import pytest

from eval.grading.answers import boxed_contents, flexible_number, last_boxed, strict_number
from eval.grading.latex import flexible_expression, strict_expression
from eval.grading.limits import cpu_limit
from eval.grading.numbers import first_number, last_number, leading_number, parse_number

MATRIX = "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("18.00", 18),
        (".5", "1/2"),
        ("18.", 18),
        ("0018", 18),
        ("1,234,567", 1234567),
        ("1,450,000.50", "2900001/2"),
        ("12,34,567", 1234567),  # Indian grouping
        ("10{,}080", 10080),
        ("11,\\! 111,\\! 100", 11111100),
        ("5\\,000", 5000),
        ("1 000", 1000),
        ("1 000 000", 1000000),
        ("1\u202f000", 1000),
        ("-5", -5),
        ("- 5", -5),
        ("\u22125", -5),
        ("+5", 5),
        ("$18", 18),
        ("\\$18.90", "189/10"),
        ("-$5", -5),
        ("$-5", -5),
        ("€7", 7),
        ("Rs. 700", 700),
        ("USD 40", 40),
        ("50%", 50),
        ("50 \\%", 50),
        ("3/4", "3/4"),
        ("3 / 4", "3/4"),
        ("-3/4", "-3/4"),
        ("\\frac{3}{4}", "3/4"),
        ("\\frac34", "3/4"),
        ("\\frac3{4}", "3/4"),
        ("\\dfrac{3}{4}", "3/4"),
        ("-\\frac{35}{9}", "-35/9"),
        ("\\frac{-3}{4}", "-3/4"),
        ("½", "1/2"),
        ("2½", "5/2"),
        ("2 1/2", "5/2"),
        ("-2 1/2", "-5/2"),
        ("1\\frac{4}{5}", "9/5"),
        ("137 \\frac{1}{2}", "275/2"),
        ("1.5e6", 1500000),
        ("2E-3", "1/500"),
        ("1.5 \\times 10^6", 1500000),
        ("3×10⁴", 30000),
        ("6.72 \\cdot 10^{-5}", "21/312500"),
        ("10^6", 1000000),
    ],
)
def test_parse_number_reads(text: str, value: int | str) -> None:
    assert parse_number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "eighteen",
        "3/0",
        "\\frac{1}{0}",
        "1,5",
        "1,2,3",
        "10 - 4",
        "5 apples",
        "1e999",
        "9" * 2000,
        "\\sqrt{2}",
        "\\sqrt2",
        "9\\pi",
        "\\pm 5",
        "\\ge 5",
        "\\sin 30",
        "\\log 5",
        "\\frac13\\pi",
        "\\begin{pmatrix} 6 \\\\ 7 \\end{pmatrix}",
    ],
)
def test_parse_number_refuses(text: str) -> None:
    assert parse_number(text) is None


def test_numbers_are_exact() -> None:
    assert parse_number("0.1") + parse_number("0.2") == parse_number("0.3")
    assert parse_number("0.333333") != parse_number("1/3")
    assert parse_number("12345678901234567891") != parse_number("12345678901234567890")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" 18 dollars a day", 18),
        (" $18.", 18),
        (" **18**", 18),
        (" $\\boxed{18}$.", 18),
        (" \\(18\\)", 18),
        (" 5 + 3 = 8", 8),
        (" x = 8", 8),
        (" 18, since x = 3", 18),
        (" Total = 5 + 6 = 11 eggs", 11),
        (" 18 or 20", 18),
        (" about 3-5", 3),
        (" - 5 degrees", -5),
        (" 18km", 18),
        (" H2O, 5 litres", 5),
        (" 10 - 4", 10),
        (" \\text{Janet has } 7 \\text{ eggs}", 7),
        (" 1,234,567.", 1234567),
        (" 3/0 or 4", 4),
        (" 15 = 3*5", 15),
        (" 60 = 100 - 40", 60),
        (" 24 = 4 times 6", 24),
        (" 24 (n=2)", 24),
        (" 18, where 9 * 3 = 27", 18),
        (" 18. Check: 2 * 10 = 20", 18),
        (" 18 since x = 3", 18),
        (" 2(9) = 18", 18),
        (" f(3) = 9", 9),
        (" (5 + 13 = 18)", 18),
        (" 9 eggs * $2 = $18", 18),
        (" 5 + 3 = 8 in 2 days", 8),
        (" x = 8 and y = 3", 8),
        (" = 8", 8),
        (" \\boxed{5 + 3 = 8}", 8),
        (" 8 = 2 cubed", 8),
        (" 7 days = 1 week", 7),
        (" 3 feet = 36 inches", 3),  # by choice
        (" 0.25 = 25%", Fraction(1, 4)),
        (" $5 = 500 cents", 5),
        (" 5 + 3 = 8 = 2 cubed", 8),
        (" f(3) = 9 eggs", 9),
        (" 5 + 3 = 8 eggs", 8),
        (" x = 8 eggs", 8),
        (" Day 3 = 9 eggs", 9),
    ],
)
def test_first_number(text: str, value: int) -> None:
    assert first_number(text).value == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She sells 9 eggs for 2 dollars each = 18.", 18),
        ("10 - 4", 4),
        ("10-4", 4),
        ("it drops to -4", -4),
        ("The 7th of 1,234,567", 1234567),
        ("5 apples\nand that is all", 5),
        ("so it is 2/3 of 3/4", "3/4"),
    ],
)
def test_last_number(text: str, value: int | str) -> None:
    assert last_number(text).value == Fraction(value)


def test_no_number() -> None:
    assert first_number("none at all") is last_number("none\nat all") is leading_number("Step 1") is None


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("So 9 * 2 = 18.\nThe answer is: 18", 18, 18),
        ("The answer is: $18.00.", 18, 18),
        ("The answer is: 1,234,567 people", 1234567, 1234567),
        ("The answer is:\n\n18", 18, 18),
        ("The answer is:\n\\[\n18\n\\]", 18, 18),
        ("The answer is:\n$$\n18\n$$", 18, 18),
        ("The answer is:\n```\n18\n```", 18, 18),
        ("The answer is:\n\\begin{equation}\n18\n\\end{equation}", 18, 18),
        ("The answer is:\n- 18", 18, 18),  # a list's dash
        ("The answer is:\n  - 18", 18, 18),
        ("The answer is:\n-18", -18, -18),
        ("The answer is: - 18", -18, -18),
        ("The answer is: 5. Wait. The answer is: 7", 7, 7),  # the last one counts
        ("The answer is: 5\nThe answer is:", None, 5),  # nothing after the last one
        ("The answer is 18", None, 18),  # no colon
        ("the answer is: 18", None, 18),  # another case
        ("The final answer is $18$.", None, 18),
        ("16 - 3 - 4 = 9\n#### 18", None, 18),
        ("#### Step 1: take 5\nThat leaves 7 eggs", None, 7),  # a Markdown heading is not a gold mark
        ("#### $1,234", None, 1234),
        ("so we get \\boxed{\\frac{3}{4}} of 12", None, "3/4"),
        ("\\boxed{18", None, 18),  # truncated
        ("**Final Answer:** 18 eggs (of 20)", None, 18),
        ("**Answer:** 5 (of 20)", None, 5),
        ("Answer: 6 in 2 days", None, 6),
        ("The answer is 4.\n#### 5 \\boxed{6}", None, 4),  # the order of forms
        ("#### 5\n\\boxed{6}", None, 5),
        ("She has 3 and then 12 left over", None, 12),
        ("The answer is: unknown, but there are 5", 5, 5),
        ("The answer is: unknown\nof 5", None, 5),
        ("no idea", None, None),
        ("", None, None),
    ],
)
def test_forms(text: str, strict: object, flexible: object) -> None:
    found = strict_number(text), flexible_number(text)
    assert [number and number.value for number in found] == [
        None if value is None else Fraction(value) for value in (strict, flexible)
    ]


def test_boxes() -> None:
    text = r"a \boxed{1} \boxed{x \boxed{2}} \fbox{\{3\}} \boxed 7 \boxed{\frac{1}{2}} \boxedx{9} \boxed{4"
    assert boxed_contents(text) == ["1", r"x \boxed{2}", r"\{3\}", "7", r"\frac{1}{2}"]
    assert last_boxed(r"\boxed{\text{a}} and \boxed{\left\{1\right\}}") == r"\left\{1\right\}"
    assert last_boxed("no box }") is None


PIECES = [
    "\\frac{1}{2}",
    "\\boxed{",
    "\\begin{a}",
    "The answer is: ",
    "answer ",
    "answer is: {",
    "####",
    "1,234",
    "1 000",
    "10⁴",
    "½",
    "1/0\n",
    "=1/0",
    "=1",
    "2e",
    "$",
    "$ ",
    "\\[",
    "\\(",
    "(",
    "{",
    "}",
    "|",
    "*",
    "- ",
    "^ ",
    "\n",
    " ",
    "a",
    "word ",
    ". ",
    "```",
]


@pytest.mark.parametrize("piece", PIECES)
def test_runaway_texts_are_read_in_no_time(piece: str) -> None:
    starts = ("", "The answer is: ", "The answer is: 1", "5\\text{", "\\boxed{5^", "the answer is\\displaystyle")
    for text in (start + piece * (60_000 // len(piece)) + end for start in starts for end in ("", " apples = 5", "}x")):
        for read in (strict_number, flexible_number, strict_expression, flexible_expression):
            with cpu_limit(2.0):
                read(text)


def test_found_by_attack() -> None:
    with cpu_limit(2.0):
        assert strict_number("The answer is: 1" + "\\frac{1}{2}" * 40 + " apples = 5") is not None
        flexible_number(("the answer is" + "=" * 1980 + "1/0\n") * 20)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("The answer is: \\frac{1}{2}.", "\\frac{1}{2}", "\\frac{1}{2}"),
        ("The answer is: $x^2$.\nDone.", "$x^2$", "x^2"),
        ("The answer is: x = 3 units, as 0 < x.", "x = 3 units, as 0 < x", "x = 3"),
        ("The answer is: Evelyn.", "Evelyn", "Evelyn"),
        ("The answer is: $1$ and $2$, as we saw $3$.", "$1$ and $2$, as we saw $3$", "1, 2"),
        (f"The answer is: {MATRIX}.\n\nOk", MATRIX, MATRIX),
        ("the answer is $\\boxed{5}$, not 6", None, "5"),
        ("\\boxed{7}. So our answer is correct.", None, "7"),
        ("so \\boxed{x^2} and \\boxed{\\{1,2\\}}", None, "\\{1,2\\}"),
        ("Final answer: $-\\frac{1}{3}$", None, "-\\frac{1}{3}"),
        ("and so we get 12 ways", None, "12"),
        ("The answer is: **18**", "18", "18"),
        ("The answer is: **18.**", "18", "18"),
        ("The answer is: **18**.", "18", "18"),
        ("**The answer is: $18$**", "$18$", "18"),
        ("The answer is: 18 - that is all", "18 - that is all", "18"),
        ("The answer is: 18 — that is all", "18 — that is all", "18"),
        ("The answer is: 10 = ten", "10 = ten", "10"),
        ("The answer is: 3 \\times something", "3 \\times something", "3"),
        ("The answer is: $5 + $3 = $8", "$5 + $3 = $8", "$5 + $3 = $8"),
        ("The answer is: $x \\to 0^+$ here", "$x \\to 0^+$ here", "x \\to 0^+"),
        ("I cannot say", None, None),
    ],
)
def test_expressions(text: str, strict: str | None, flexible: str | None) -> None:
    assert (strict_expression(text), flexible_expression(text)) == (strict, flexible)
