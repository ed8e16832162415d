"""Self-made arithmetic word problems with known label noise and known family imbalance: the embedded default's data.

    python -m data.toy --split finetune --num-rows 3000 --imbalance 0.25 --label-noise 0.1 --output toy.jsonl

A row is {"query", "response", "family", "answer"}, MetaMath's columns and two more: `answer` is always the right one,
so a row is noisy exactly where its response ends on another number. Real sets hide how much of them is wrong or rare;
here both are settings, so that inherited noise and imbalance can be told from what fine-tuning adds.

Three splits share no operands and no wording: "pretrain" (what data/toy/pretrain.py reads, ending "#### N"), "finetune"
and "test" (MetaMath's ending, "The answer is: N"). The same arguments give the same rows on every machine; a larger
`num_rows` only appends, and `label_noise` changes responses, never queries.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.io import write_jsonl_atomic
from ba_lora.paths import written_path

SPLITS = ("pretrain", "finetune", "test")
SPLIT_PERCENT = {"pretrain": 70, "finetune": 15, "test": 15}  # of all operand tuples

# The committed data/toy/test.jsonl is `generate(num_rows=TEST_FILE_ROWS, seed=TEST_FILE_SEED, split="test")`.
TEST_FILE_ROWS = 400
TEST_FILE_SEED = 0

PEOPLE = (
    ("Tom", "he"), ("Ann", "she"), ("Ben", "he"), ("Mia", "she"),
    ("Sam", "he"), ("Eva", "she"), ("Leo", "he"), ("Zoe", "she"),
)  # fmt: skip
ITEMS = ("apples", "pens", "books", "cards", "coins", "eggs", "cups", "toys")
WRONG_BY = (-10, -2, -1, 1, 2, 10)  # a slip of one or two, or a lost carry


@dataclass(frozen=True)
class Step:
    """One worked line, "left operator right = result note"; `/` is always exact."""

    left: int
    operator: str
    right: int
    note: str

    @property
    def result(self) -> int:
        if self.operator == "/":
            assert self.left % self.right == 0, f"{self.left} / {self.right} is not an integer"
            return self.left // self.right
        return {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.operator]


@dataclass(frozen=True)
class Family:
    """One kind of problem: how its operands are drawn and how it is solved."""

    draw: Callable[[random.Random], tuple[int, ...]]
    solve: Callable[..., list[Step]]


def _add(a: int, b: int, c: int) -> list[Step]:
    return [Step(a, "+", b, "so far"), Step(a + b, "+", c, "in all")]


def _subtract(a: int, b: int, c: int) -> list[Step]:
    return [Step(a, "-", b, "so far"), Step(a - b, "-", c, "left")]


def _multiply(a: int, b: int, c: int) -> list[Step]:
    return [Step(a, "*", b, "so far"), Step(a * b, "+", c, "in all")]


def _shopping(a: int, b: int, c: int, d: int) -> list[Step]:
    return [Step(a, "*", b, "dollars"), Step(c, "*", d, "dollars"), Step(a * b, "+", c * d, "dollars")]


def _sharing(a: int, b: int, c: int) -> list[Step]:
    return [Step(a, "+", b, "in all"), Step(a + b, "/", c, "each")]


def _rate(a: int, b: int, c: int) -> list[Step]:
    return [Step(a, "*", b, "so far"), Step(a * b, "-", c, "left")]


def _change(a: int, b: int, c: int) -> list[Step]:
    return [Step(b, "*", c, "dollars"), Step(a, "-", b * c, "dollars left")]


def _age(a: int, b: int, c: int) -> list[Step]:
    return [Step(a, "*", b, "years old"), Step(a * b, "+", c, "years old")]


def _average(a: int, b: int, c: int) -> list[Step]:
    return [Step(a, "+", b, "so far"), Step(a + b, "+", c, "in all"), Step(a + b + c, "/", 3, "on average")]


def _perimeter(a: int, b: int) -> list[Step]:
    return [Step(a, "+", b, "meters"), Step(a + b, "*", 2, "meters around")]


def _draw_subtract(rng: random.Random) -> tuple[int, int, int]:
    left, b, c = rng.randint(2, 40), rng.randint(3, 30), rng.randint(3, 29)
    return left + b + c, b, c


def _draw_sharing(rng: random.Random) -> tuple[int, int, int]:
    c = rng.randint(2, 9)
    total = c * rng.randint(3, 10)
    a = rng.randint(2, total - 2)
    return a, total - a, c


def _draw_rate(rng: random.Random) -> tuple[int, int, int]:
    a, b = rng.randint(3, 10), rng.randint(2, 9)
    return a, b, rng.randint(2, min(a * b - 1, 30))


def _draw_change(rng: random.Random) -> tuple[int, int, int]:
    b, c = rng.randint(2, 9), rng.randint(2, 9)
    return rng.randint(b * c + 1, 99), b, c


def _draw_average(rng: random.Random) -> tuple[int, int, int]:
    total = 3 * rng.randint(4, 20)
    a = rng.randint(2, total - 4)
    b = rng.randint(2, total - a - 2)
    return a, b, total - a - b


# From the most to the least frequent under `imbalance`; the last three are the rare ones.
FAMILIES: dict[str, Family] = {
    "shopping": Family(
        lambda rng: (rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)), _shopping
    ),
    "add": Family(lambda rng: (rng.randint(3, 60), rng.randint(3, 60), rng.randint(2, 40)), _add),
    "subtract": Family(_draw_subtract, _subtract),
    "multiply": Family(lambda rng: (rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 30)), _multiply),
    "rate": Family(_draw_rate, _rate),
    "sharing": Family(_draw_sharing, _sharing),
    "change": Family(_draw_change, _change),
    "age": Family(lambda rng: (rng.randint(3, 9), rng.randint(2, 6), rng.randint(2, 20)), _age),
    "average": Family(_draw_average, _average),
    "perimeter": Family(lambda rng: (rng.randint(3, 49), rng.randint(2, 40)), _perimeter),
}
# WORDING[family][split] holds "openings" and "questions"; any opening goes with any question. Placeholders: the
# operands {a}, {b}, {c}, {d}; {name}, {other} (two people); {he}, {He}; {items}, {more} (two things).
WORDING = json.loads(Path(__file__).with_name("toy").joinpath("wording.json").read_text(encoding="utf-8"))


def split_of(operands: Sequence[int]) -> str:
    """Return the one split that may use these operands, in any order and in any family."""
    digest = hashlib.sha256(",".join(map(str, sorted(operands))).encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 100
    for split in SPLITS:
        bucket -= SPLIT_PERCENT[split]
        if bucket < 0:
            return split
    raise AssertionError("SPLIT_PERCENT does not sum to 100")


def family_shares(imbalance: float = 0.0, family_weights: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return each family's share of the rows (they sum to 1).

    Without weights the shares are geometric in the order of `FAMILIES`: share_i ∝ (1 − imbalance)^i, so 0 is uniform
    and 0.3 makes the last family 25 times rarer than the first. `family_weights` gives relative shares by name instead;
    a family it leaves out does not occur.

    Raises ValueError: imbalance outside [0, 1), both given, an unknown family, a negative weight, all weights 0.
    """
    if not 0 <= imbalance < 1:
        raise ValueError(f"imbalance must be at least 0 (uniform) and below 1, not {imbalance}")
    if family_weights is None:
        weights = {name: (1 - imbalance) ** i for i, name in enumerate(FAMILIES)}
    else:
        if imbalance:
            raise ValueError("give imbalance or the families' weights, not both")
        _check_families(family_weights)
        weights = {name: float(family_weights.get(name, 0)) for name in FAMILIES}
        if not all(0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"family_weights must be at least 0, finite, and not all 0: {dict(family_weights)}")
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _check_families(names) -> None:
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise ValueError(f"unknown family {unknown[0]!r}: the families are {', '.join(FAMILIES)}")


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")


def generate_problems(
    *,
    num_rows: int,
    seed: int,
    split: str,
    label_noise: float = 0.0,
    noisy_families: Sequence[str] = (),
    imbalance: float = 0.0,
    family_weights: Mapping[str, float] | None = None,
    numbers: str | None = None,
) -> list[dict[str, str]]:
    """Return `num_rows` problems as {"query", "response", "family", "answer"}, each row drawn independently.

    split: whose wording, operands and answer form ("#### N" for pretrain, "The answer is: N" otherwise).
    label_noise: the probability that a row's last result, and with it the answer, is wrong; `noisy_families` keeps the
        noise to those families (their rows are wrong with that probability, all others right).
    imbalance, family_weights: see `family_shares`.
    numbers: take the operands of another split, e.g. the pretrain wording on operands never pre-trained on.

    Raises ValueError with one line for every argument out of range or unknown.
    """
    _check_split(split)
    _check_split(numbers or split)
    if isinstance(num_rows, bool) or not isinstance(num_rows, int) or num_rows < 1:
        raise ValueError(f"num_rows must be a positive integer, not {num_rows!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, not {seed!r}")
    if not 0 <= label_noise <= 1:
        raise ValueError(f"label_noise is a fraction from 0 to 1, not {label_noise}")
    if isinstance(noisy_families, str):
        raise ValueError(f"noisy_families must be a list of families, not the string {noisy_families!r}")
    _check_families(noisy_families)
    shares = family_shares(imbalance, family_weights)
    names, weights = list(shares), list(shares.values())

    rows = []
    for index in range(num_rows):
        rng = random.Random(f"{seed}/{split}/{index}")
        name = rng.choices(names, weights)[0]
        family = FAMILIES[name]
        operands = family.draw(rng)
        while split_of(operands) != (numbers or split):
            operands = family.draw(rng)
        query = _word(name, split, operands, rng)
        steps = family.solve(*operands)
        answer = given = steps[-1].result
        noise = random.Random(f"noise/{seed}/{split}/{index}")  # its own stream: noise never changes the questions
        if noise.random() < label_noise and (not noisy_families or name in noisy_families):
            given = noise.choice([answer + by for by in WRONG_BY if answer + by >= 0])
        rows.append({"query": query, "response": _respond(steps, given, split), "family": name, "answer": str(answer)})
    return rows


def _word(family: str, split: str, operands: tuple[int, ...], rng: random.Random) -> str:
    wording = WORDING[family][split]
    (name, he), (other, _) = rng.sample(PEOPLE, 2)
    items, more = rng.sample(ITEMS, 2)
    template = f"{rng.choice(wording['openings'])} {rng.choice(wording['questions'])}"
    values = dict(zip("abcd", operands, strict=False))
    return template.format(name=name, other=other, he=he, He=he.capitalize(), items=items, more=more, **values)


def _respond(steps: list[Step], given: int, split: str) -> str:
    """Return the worked lines and the answer; the last line and the answer both carry `given`."""
    results = [step.result for step in steps[:-1]] + [given]
    lines = [f"{s.left} {s.operator} {s.right} = {r} {s.note}" for s, r in zip(steps, results, strict=True)]
    return "\n".join([*lines, f"#### {given}" if split == "pretrain" else f"The answer is: {given}"])


def pretraining_prompt(query: str) -> str:
    """Return the frame in which the tiny bases were pre-trained; the response follows after one space."""
    return f"Question: {query}\nAnswer:"


def _weights(text: str) -> dict[str, float]:
    try:
        return {name: float(weight) for name, weight in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise UserError(f"--family-weights {text!r}: write NAME=WEIGHT,NAME=WEIGHT") from error


def main() -> None:
    parser = CommandParser(prog="python -m data.toy", description="Write self-made word problems as jsonl.")
    parser.add_argument("--split", required=True, help=", ".join(SPLITS))
    parser.add_argument("--num-rows", type=int, default=TEST_FILE_ROWS)
    parser.add_argument("--seed", type=int, default=TEST_FILE_SEED)
    parser.add_argument("--label-noise", type=float, default=0.0, help="fraction of rows with a wrong answer")
    parser.add_argument("--noisy-families", default="", help="comma-separated; default: all families")
    parser.add_argument("--imbalance", type=float, default=0.0, help="0 = all families alike, below 1")
    parser.add_argument("--family-weights", default=None, help="NAME=WEIGHT,NAME=WEIGHT instead of --imbalance")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    try:
        rows = generate_problems(
            num_rows=args.num_rows,
            seed=args.seed,
            split=args.split,
            label_noise=args.label_noise,
            noisy_families=[name for name in args.noisy_families.split(",") if name],
            imbalance=args.imbalance,
            family_weights=_weights(args.family_weights) if args.family_weights else None,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    write_jsonl_atomic(written_path(args.output), rows)
    print(f"{len(rows)} rows -> {args.output}")


if __name__ == "__main__":
    run_entry_point(main)
