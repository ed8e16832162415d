"""Self-made sentence pairs with known label noise and known imbalance: the embedded default of the NLU experiments.

    python -m data.toy_nlu --split train --num-rows 1500 --imbalance 0.5 --label-noise 0.1 --output pairs.jsonl

A row is {"premise", "hypothesis", "label", "true_label", "kind"}, MNLI's columns and two more: `label` is noisy exactly
where it differs from `true_label`; `kind` names what was done to the premise:

    entailment      the same event in other words, or one part of it
    neutral         the event with a detail that the premise leaves open, or another of the same person
    contradiction   the event with one part exchanged for one that excludes it: place, colour, number, time, "not"

The splits share no verb's objects and no wording of the premise, so that the test set asks for more than patterns of
words. The same arguments give the same rows on every machine; a larger `num_rows` only appends; noise changes labels,
never sentences.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.io import write_jsonl_atomic
from ba_lora.paths import written_path

LABELS = ("entailment", "neutral", "contradiction")  # MNLI's, by id
RARE_LABEL = "contradiction"
SPLITS = ("train", "test")

PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ivy", "Jonas", "Kate", "Leo")
PLACES = (
    ("in the kitchen", "indoors"), ("in the garden", "outdoors"), ("at the beach", "outdoors"),
    ("in the library", "indoors"), ("in the park", "outdoors"), ("in the office", "indoors"),
    ("in the forest", "outdoors"), ("in the museum", "indoors"),
)  # fmt: skip
TIMES = ("in the morning", "in the evening", "at noon", "at midnight")
COLOURS = ("red", "blue", "green", "yellow", "black", "white")
NUMBERS = ("two", "three", "four", "five", "six", "seven")
# verb → (past tense, another word for it, its opposite); objects by split
VERBS = (
    ("bought", "purchased", "sold"), ("found", "discovered", "lost"), ("opened", "unlocked", "closed"),
    ("carried", "transported", "dropped"), ("repaired", "fixed", "broke"), ("painted", "decorated", "washed"),
    ("collected", "gathered", "scattered"), ("received", "got", "sent"),
)  # fmt: skip
OBJECTS = {
    "train": ("boxes", "books", "chairs", "bottles", "bicycles", "lamps", "baskets", "toys"),
    "test": ("suitcases", "paintings", "umbrellas", "jars", "guitars", "clocks"),
}
FRAMES = {
    "train": ("{person} {verb} {number} {colour} {object} {place} {time}.",
              "{Time}, {person} {verb} {number} {colour} {object} {place}."),
    "test": ("It was {time} that {person} {verb} {number} {colour} {object} {place}.",
             "{Place}, {person} {verb} {number} {colour} {object} {time}."),
}  # fmt: skip
DETAILS = (
    "for a friend", "because they were cheap", "with great care", "for the second time", "without telling anyone",
    "to surprise the neighbours", "although it was raining", "for a school project",
)  # fmt: skip
ACTIVITIES = ("slept badly", "likes to travel", "has two sisters", "works as a teacher", "was hungry", "speaks Spanish")


@dataclass(frozen=True)
class Event:
    """Who did what to how many of which things, where and when."""

    person: str
    verb: tuple[str, str, str]
    number: str
    colour: str
    object: str
    place: tuple[str, str]
    time: str


def generate_pairs(
    *,
    num_rows: int,
    seed: int,
    split: str,
    label_noise: float = 0.0,
    noisy_labels: Sequence[str] = (),
    imbalance: float = 0.0,
) -> list[dict[str, str | int]]:
    """Return `num_rows` pairs, each drawn independently.

    label_noise: the probability that a row's label is another one; `noisy_labels` keeps it to rows of these labels.
    imbalance: 0 gives the labels equal shares; the share of `contradiction` is (1 − imbalance) / 3, the other two
    divide the rest. Raises ValueError in one line for every argument out of range or unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if isinstance(num_rows, bool) or not isinstance(num_rows, int) or num_rows < 1:
        raise ValueError(f"num_rows must be a positive integer, not {num_rows!r}")
    for name, value, below in (("label_noise", label_noise, math.inf), ("imbalance", imbalance, 1)):
        if not (0 <= value <= 1 and value < below):
            raise ValueError(f"{name} is {value}: it must lie between 0 and 1" + (", below 1" if below == 1 else ""))
    unknown = [name for name in noisy_labels if name not in LABELS]
    if unknown:
        raise ValueError(f"unknown label {unknown[0]!r} in noisy_labels: labels are {', '.join(LABELS)}")
    rare = (1 - imbalance) / 3
    weights = [rare if name == RARE_LABEL else (1 - rare) / 2 for name in LABELS]
    rows = []
    for index in range(num_rows):
        rng = random.Random(f"{seed}/{split}/{index}")
        true = rng.choices(LABELS, weights)[0]
        event = _draw(rng, split)
        premise = _say(event, rng.choice(FRAMES[split]))
        kind, hypothesis = rng.choice(KINDS[true])(event, rng)
        given = true
        noise = random.Random(f"noise/{seed}/{split}/{index}")  # its own stream: noise never changes the sentences
        if noise.random() < label_noise and (not noisy_labels or true in noisy_labels):
            given = noise.choice([name for name in LABELS if name != true])
        rows.append(
            {
                "premise": premise,
                "hypothesis": hypothesis,
                "label": LABELS.index(given),
                "true_label": LABELS.index(true),
                "kind": kind,
            }
        )
    return rows


def _draw(rng: random.Random, split: str) -> Event:
    return Event(
        rng.choice(PEOPLE), rng.choice(VERBS), rng.choice(NUMBERS), rng.choice(COLOURS),
        rng.choice(OBJECTS[split]), rng.choice(PLACES), rng.choice(TIMES),
    )  # fmt: skip


def _say(event: Event, frame: str) -> str:
    place = event.place[0]
    return frame.format(
        person=event.person, verb=event.verb[0], number=event.number, colour=event.colour, object=event.object,
        place=place, Place=place[0].upper() + place[1:], time=event.time, Time=event.time[0].upper() + event.time[1:],
    )  # fmt: skip


def _other(rng: random.Random, choices: Sequence, value: object) -> object:
    return rng.choice([choice for choice in choices if choice != value])


# ---- entailment ----


def _synonym(e: Event, rng: random.Random) -> tuple[str, str]:
    return "synonym", f"{e.person} {e.verb[1]} {e.number} {e.colour} {e.object}."


def _passive(e: Event, rng: random.Random) -> tuple[str, str]:
    return "passive", f"{e.number.capitalize()} {e.object} were {_participle(e.verb[1])} by {e.person} {e.place[0]}."


def _part(e: Event, rng: random.Random) -> tuple[str, str]:
    return "part", rng.choice(
        (
            f"{e.person} was {e.place[1]} {e.time}.",
            f"The {e.object} were {e.colour}.",
            f"There were {e.number} {e.object}.",
        )
    )


# ---- neutral ----


def _detail(e: Event, rng: random.Random) -> tuple[str, str]:
    return "detail", f"{e.person} {e.verb[1]} the {e.object} {rng.choice(DETAILS)}."


def _other_fact(e: Event, rng: random.Random) -> tuple[str, str]:
    return "other_fact", f"{e.person} {rng.choice(ACTIVITIES)}."


# ---- contradiction ----


def _exchanged(e: Event, rng: random.Random) -> tuple[str, str]:
    part = rng.choice(("number", "colour", "place"))
    if part == "number":
        return "number", f"{e.person} {e.verb[1]} {_other(rng, NUMBERS, e.number)} {e.colour} {e.object}."
    if part == "colour":
        return "colour", f"The {e.object} were {_other(rng, COLOURS, e.colour)}."
    return "place", f"{e.person} was {'outdoors' if e.place[1] == 'indoors' else 'indoors'} {e.time}."


def _opposite(e: Event, rng: random.Random) -> tuple[str, str]:
    return "opposite", f"{e.person} {e.verb[2]} the {e.number} {e.object} {e.time}."


def _negation(e: Event, rng: random.Random) -> tuple[str, str]:
    return "negation", f"{e.person} never {e.verb[1]} any {e.object} {e.place[0]}."


KINDS = {
    "entailment": (_synonym, _passive, _part),
    "neutral": (_detail, _other_fact),
    "contradiction": (_exchanged, _opposite, _negation),
}
_IRREGULAR = {"got": "received"}


def _participle(verb: str) -> str:
    return _IRREGULAR.get(verb, verb)


def main() -> None:
    parser = CommandParser(prog="python -m data.toy_nlu", description="Write self-made sentence pairs as jsonl.")
    parser.add_argument("--split", required=True, help=", ".join(SPLITS))
    parser.add_argument("--num-rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label-noise", type=float, default=0.0, help="share of rows with a wrong label")
    parser.add_argument("--noisy-labels", default="", help="comma-separated; default: all")
    parser.add_argument(
        "--imbalance", type=float, default=0.0, help="0: equal shares; towards 1: contradiction is rare"
    )
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    try:
        rows = generate_pairs(
            num_rows=options.num_rows,
            seed=options.seed,
            split=options.split,
            label_noise=options.label_noise,
            noisy_labels=[name for name in options.noisy_labels.split(",") if name],
            imbalance=options.imbalance,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    write_jsonl_atomic(written_path(options.output), rows)
    print(f"{len(rows)} rows -> {options.output}")


if __name__ == "__main__":
    run_entry_point(main)
