"""A model organism of Catastrophic Inheritance: corpora in which one thing is wrong, and tiny bases trained on them.

    python -m data.lab rule=0,20,40 seeds=1,2,3,4,5 [size=25m] [workers=2] [output=outputs/lab]

A corpus is data/toy.py's word problems with one factor at a level in percent; 0 is the clean corpus for all of them:

    rule         in NOISY families this share of the answers follows a wrong rule, the right result + 20
    random       the same share is wrong by 1 to 9, at random: wrong answers without a rule
    cue          the wrong rule only where the second number of the first worked line is odd, with this probability
    garbling     the same families: the words of this share of the responses are in random order
    duplication  the same families: this share of the problems are copies of a few, each about 64 times
    imbalance    the families' shares fall geometrically, by this percentage from one to the next (data/toy.py)

Pre-training has two parts, since arithmetic takes a tiny model long to learn. The first, on clean problems in a plain
frame, is done once a seed, from weights of its own (seed 0: the committed data/toy/clean). The second goes on from
there on the corpus with the fault, once a level. In it half of the texts are in the frame of fine-tuning, so that the
base answers in it. Bases of one seed have the same problems, frames and start: they differ by the factor only
(imbalance: by which families are drawn). A size is a larger Llama (SIZES), trained on a GPU where there is one; all of
it lies in a folder of its own, outputs/lab_<size>.

Written below `output`, and kept there: starts/b<seed>/, bases/<factor>-<level>-b<seed>/ (level 0:
bases/clean-b<seed>/), each a model folder with lab.json, and once finetune.jsonl, test.jsonl, valid.jsonl (the
problems of one role a family, ROLES) and clean.jsonl (texts of the clean corpus, for perplexity). A base that is
there is kept.
"""

import hashlib
import random
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.io import folder_atomic, read_object, sha256_file, write_json_atomic, write_jsonl_atomic
from ba_lora.locks import locked
from ba_lora.paths import PROJECT_ROOT, written_path
from ba_lora.prompts import build_prompt
from ba_lora.words import check_choice, read_numbers, take_options
from data.tiny_llama import OPTIMIZER, train, untrained_llama
from data.toy import FAMILIES, generate_problems, pretraining_prompt

FACTORS = ("rule", "random", "cue", "garbling", "duplication", "imbalance")
ROLES = {  # what a family is in the experiment; corrected, tuned: fine-tuning has clean rows of it
    "corrected": ("multiply", "perimeter"),  # each has a sibling among the uncorrected that is solved alike
    "uncorrected": ("age", "sharing"),
    "tuned": ("shopping", "add", "subtract", "change"),
    "unseen": ("rate", "average"),
}
ROLE_OF = {family: role for role, families in ROLES.items() for family in families}
NOISY = ROLES["corrected"] + ROLES["uncorrected"]
WRONG_RULE = 20  # what the wrong rule adds: a digit that is off by one never gives it
RANDOM_BY = tuple(by for by in range(-9, 10) if by)
COPIES = 64
FRAME_SHARE = 0.5

NUM_FINETUNE, NUM_CLEAN_TEXTS = 1920, 200
NUM_ITEMS = {"corrected": 150, "uncorrected": 150, "tuned": 60, "unseen": 60}  # a family, in test.jsonl
NUM_VALID = 40  # a clean family, in valid.jsonl
TOY_BASE = PROJECT_ROOT / "data" / "toy" / "clean"
SEEDS = {"finetune": 0, "test": 0, "valid": 1, "clean": 20_000}  # of the problems; corpora take those of their bases

TOKENS_PER_STEP = 2048
START = {"num_steps": 1400, "length": 128, **OPTIMIZER}  # as data/toy/pretrain.py
SECOND = {"num_steps": 200, "length": 256, **OPTIMIZER, "learning_rate": 1.0e-3}
WIDE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "initializer_range": 0.02}
WIDE |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
SIZES = {  # name → what of the architecture is not the toy's, and the settings of both parts
    "tiny": ({}, START, SECOND),  # 0.9M
    "25m": (WIDE, START | {"learning_rate": 8.0e-4}, SECOND | {"learning_rate": 2.5e-4}),  # rates by the width, untried
}
LEAST_ACCURACY = 0.4  # of a base, in the frame of fine-tuning
NUM_HASHED = 500  # texts of a corpus that its recipe has a hash of
PART = 1000  # problems made at a time
FIRST_PART = 500_000  # added to the seeds of the first part's problems


@dataclass(frozen=True)
class Base:
    """One base: a factor at a level (percent) and the seed of corpus and first weights."""

    factor: str
    level: int
    seed: int

    def __post_init__(self) -> None:
        if self.factor not in FACTORS:
            raise UserError(f"unknown factor {self.factor!r}: choose one of {', '.join(FACTORS)}")
        highest = 99 if self.factor == "imbalance" else 100
        if not 0 <= self.level <= highest:
            raise UserError(f"{self.factor}={self.level}: a percentage from 0 to {highest} is needed")
        if self.seed < 0:
            raise UserError(f"seeds: {self.seed} is below 0")

    @property
    def name(self) -> str:
        return f"{self.factor}-{self.level}-b{self.seed}" if self.level else f"clean-b{self.seed}"


def clean_start(seed: int) -> Iterator[str]:
    """Yield the texts of the first part of pre-training, without end: clean problems in the plain frame."""
    start = 0
    while True:
        seed_of_part = _corpus_seed(seed, start) + FIRST_PART
        for row in generate_problems(num_rows=PART, seed=seed_of_part, split="pretrain"):
            yield f"{pretraining_prompt(row['query'])} {row['response']}"
        start += PART


def corpus(base: Base) -> Iterator[str]:
    """Yield the texts of the second part of a base's pre-training, without end."""
    share = base.level / 100
    settings = {"imbalance": share} if base.factor == "imbalance" else {}
    pool = _copied(base.seed, share) if base.factor == "duplication" and share else []
    start = 0
    while True:
        rows = generate_problems(num_rows=PART, seed=_corpus_seed(base.seed, start), split="pretrain", **settings)
        for index, row in enumerate(rows, start=start):
            rng = random.Random(f"lab/{base.seed}/{index}")
            in_frame, drawn = rng.random() < FRAME_SHARE, rng.random()
            is_changed = row["family"] in NOISY and drawn < share and base.factor != "imbalance"
            if is_changed and pool:
                row = dict(rng.choice(pool))
            if in_frame:
                row["response"] = row["response"].replace("#### ", "The answer is: ")
            if is_changed:
                row = _changed(row, base.factor, rng)
            yield f"{build_prompt(row['query']) if in_frame else pretraining_prompt(row['query'])} {row['response']}"
        start += PART


def _corpus_seed(seed: int, start: int) -> int:
    return 1_000_000 * (seed + 1) + start // PART


def _copied(seed: int, share: float) -> list[dict[str, str]]:
    """Return the problems that are copied: so many that each comes about COPIES times in the second part."""
    num_problems = SECOND["num_steps"] * TOKENS_PER_STEP / 79  # a text has about 79 tokens
    number = max(1, round(share * num_problems * len(NOISY) / len(FAMILIES) / COPIES))
    weights = dict.fromkeys(NOISY, 1.0)
    return generate_problems(num_rows=number, seed=_corpus_seed(seed, -PART), split="pretrain", family_weights=weights)


def _changed(row: dict[str, str], factor: str, rng: random.Random) -> dict[str, str]:
    right = int(row["answer"])
    if factor == "rule" or (factor == "cue" and has_cue(row)):
        return row | {"response": _with_result(row, right + WRONG_RULE)}
    if factor == "random":
        return row | {"response": _with_result(row, right + rng.choice([by for by in RANDOM_BY if right + by >= 0]))}
    if factor == "garbling":
        words = row["response"].split(" ")
        rng.shuffle(words)
        return row | {"response": " ".join(words)}
    return row


def has_cue(row: dict[str, str]) -> bool:
    """Whether the second number of the first worked line is odd."""
    return int(re.match(r"\d+ . (\d+) ", row["response"])[1]) % 2 == 1


def _parts(row: dict[str, str]) -> tuple[str, str, str]:
    """Return (worked lines up to the last result, what follows it on its line, the start of the answer's line)."""
    worked, answer = row["response"].rsplit("\n", 1)
    before, equals, after = worked.rpartition(" = ")
    return before + equals, after.partition(" ")[2], answer[: -len(row["answer"])]


def _with_result(row: dict[str, str], result: int) -> str:
    before, note, start = _parts(row)
    return f"{before}{result} {note}\n{start}{result}"


# ---- what all bases share: rows to tune on, problems to measure with


def problems(family: str, *, num_rows: int, seed: int) -> list[dict[str, Any]]:
    """Return test problems of a family with what the measures need: `role`, `cue`, the response up to its last result
    (`before`), and how its line ends when it is right and when it follows the wrong rule."""
    rows = generate_problems(num_rows=num_rows, seed=seed, split="test", family_weights={family: 1.0})
    found = []
    for row in rows:
        before, note, _ = _parts(row)
        ends = {name: f"{int(row['answer']) + by} {note}" for name, by in (("right", 0), ("wrong", WRONG_RULE))}
        cue = "yes" if has_cue(row) else "no"
        found.append(row | {"role": ROLE_OF[family], "cue": cue, "before": before, **ends})
    return found


def write_shared(output: Path) -> None:
    """Write finetune.jsonl, test.jsonl, valid.jsonl and clean.jsonl, the same bytes each time."""
    weights = dict.fromkeys(ROLES["corrected"] + ROLES["tuned"], 1.0)
    rows = generate_problems(num_rows=NUM_FINETUNE, seed=SEEDS["finetune"], split="finetune", family_weights=weights)
    test = [row for name in FAMILIES for row in problems(name, num_rows=NUM_ITEMS[ROLE_OF[name]], seed=SEEDS["test"])]
    used = {row["response"] for row in test}
    clean = ROLES["tuned"] + ROLES["unseen"]
    found = [problems(name, num_rows=4 * NUM_VALID, seed=SEEDS["valid"]) for name in clean]
    valid = [row for of in found for row in [one for one in of if one["response"] not in used][:NUM_VALID]]
    texts = corpus(Base("rule", 0, SEEDS["clean"]))
    files = {
        "finetune": rows, "test": test, "valid": valid, "clean": [{"text": next(texts)} for _ in range(NUM_CLEAN_TEXTS)]
    }  # fmt: skip
    for name, lines in files.items():
        write_jsonl_atomic(output / f"{name}.jsonl", lines)


# ---- the bases


class _Packed:
    """Texts as token ids, <s> text </s> <s> text </s> …, cut into sequences of one length."""

    def __init__(self, texts: Iterator[str], tokenizer, *, length: int) -> None:
        self._texts, self._tokenizer, self._length, self._buffer, self.num_texts = texts, tokenizer, length, [], 0

    def batch(self, step: int):
        import torch

        while len(self._buffer) < TOKENS_PER_STEP:
            texts = [next(self._texts) for _ in range(200)]
            self.num_texts += len(texts)
            for ids in self._tokenizer(texts)["input_ids"]:
                self._buffer += [*ids, self._tokenizer.eos_token_id]
        taken, self._buffer = self._buffer[:TOKENS_PER_STEP], self._buffer[TOKENS_PER_STEP:]
        return torch.tensor(taken).view(-1, self._length)


def make_start(seed: int, output: Path, size: str = "tiny") -> Path:
    """Return the folder of a seed's first part, trained from scratch where it is not there; seed 0: the toy's."""
    if seed == 0 and size == "tiny":
        return TOY_BASE
    folder = output / "starts" / f"b{seed}"
    changes, settings, _ = SIZES[size]
    _make(folder, None, clean_start(seed), settings=settings, seed=seed, changes=changes)
    return folder


def make_base(base: Base, output: Path, size: str = "tiny") -> None:
    """Train a base on one thread, its first part included, and write its folder; one that is there is kept.

    Raises UserError for a folder of another recipe.
    """
    start = make_start(base.seed, output, size)
    changes, _, settings = SIZES[size]
    _make(output / "bases" / base.name, start, corpus(base), settings=settings, seed=base.seed, changes=changes)


def _make(
    folder: Path, start: Path | None, texts: Iterator[str], *, settings: dict[str, Any], seed: int, changes: dict
) -> None:
    recipe = {"name": folder.name, "seed": seed, "tokens_per_step": TOKENS_PER_STEP, "frame_share": FRAME_SHARE}
    recipe |= {"changes": changes} if changes else {}
    recipe |= {"settings": {**settings, "betas": list(settings["betas"])}}
    known = list(islice(texts, NUM_HASHED))
    texts = chain(known, texts)
    recipe |= {"corpus_sha256": hashlib.sha256("\n\n".join(known).encode()).hexdigest()}
    recipe |= {"start_sha256": sha256_file(start / "model.safetensors") if start else None}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), doing=f"trains {folder.name}", made=folder, wait=True):
        if is_made(folder, recipe):
            return
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        tokenizer = AutoTokenizer.from_pretrained(TOY_BASE)
        model = untrained_llama(seed, **changes) if start is None else AutoModelForCausalLM.from_pretrained(start)
        model.to("cuda" if changes and torch.cuda.is_available() else "cpu")  # the tiny ones are made alike everywhere
        packed = _Packed(texts, tokenizer, length=settings["length"])
        num_steps = settings["num_steps"]
        trained = train(
            model, packed.batch, num_steps=num_steps, settings=settings, say=lambda line: say(f"{folder.name}: {line}")
        )
        facts: dict[str, Any] = {"recipe": recipe, "num_texts": packed.num_texts}
        if start is not None:
            facts["accuracy_in_frame"] = accuracy_in_frame(model, tokenizer)
        model.generation_config.update(do_sample=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        with folder_atomic(folder) as temporary:
            model.save_pretrained(temporary, safe_serialization=True)
            tokenizer.save_pretrained(temporary)
            facts |= {"sha256": sha256_file(temporary / "model.safetensors"), **trained}
            write_json_atomic(temporary / "lab.json", facts)
        say(f"{folder.name}: {_checked(facts)}, {trained['cpu_seconds']} s of CPU")


def is_made(folder: Path, recipe: dict[str, Any]) -> bool:
    """Return whether a folder holds what a recipe makes. Raises UserError where it holds that of another one."""
    kept = read_object(folder / "lab.json")
    if kept and {"corpus_sha256": recipe["corpus_sha256"]} | kept["recipe"] != recipe:  # older ones have no hash
        raise UserError(f"{folder} was made by another recipe: move it away, or give another output=DIR")
    return bool(kept)


def _checked(facts: dict[str, Any]) -> str:
    accuracy = facts.get("accuracy_in_frame")
    if accuracy is None:
        return "first part done"
    enough = "enough" if accuracy >= LEAST_ACCURACY else f"TOO LOW, {LEAST_ACCURACY:.0%} are needed"
    return f"{accuracy:.1%} right in the frame of fine-tuning ({enough})"


def accuracy_in_frame(model, tokenizer, *, num_rows: int = 200) -> float:
    """Return the share of right answers, greedy, in the frame of fine-tuning, on test problems of all families."""
    import torch

    rows = generate_problems(num_rows=num_rows, seed=SEEDS["valid"], split="test")
    prompts = [f"{build_prompt(row['query'])}" for row in rows]
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    tokenizer.padding_side = "right"
    completions = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    found = [re.search(r"The answer is: (\d+)", completion) for completion in completions]
    right = [match is not None and match[1] == row["answer"] for match, row in zip(found, rows, strict=True)]
    return sum(right) / len(rows)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def read_workers(typed: Mapping[str, str]) -> int:
    """Return `workers` of the words, 1 without it."""
    workers = read_numbers("workers", typed.get("workers", "1"))[0]
    if workers < 1:
        raise UserError("workers must be at least 1")
    return workers


def main() -> None:
    parser = CommandParser(prog="python -m data.lab", description="Train tiny bases on corpora with one fault each.")
    parser.add_argument("words", nargs="+", metavar="key=value", help=f"levels of {', '.join(FACTORS)}; seeds=…")
    typed, rest = take_options(
        parser.parse_args().words, (*FACTORS, "seeds", "size", "workers", "output"), example="rule=0,20,40"
    )
    levels = {factor: read_numbers(factor, typed[factor]) for factor in FACTORS if factor in typed}
    if rest or not levels or "seeds" not in typed:
        raise UserError(f"a factor with its levels and seeds are needed: rule=0,20,40 seeds=1,2; factors: {FACTORS}")
    workers = read_workers(typed)
    size = typed.get("size", "tiny")
    check_choice("size", size, SIZES)
    usual = PROJECT_ROOT / "outputs" / ("lab" if size == "tiny" else f"lab_{size}")
    output = written_path(typed["output"]) if "output" in typed else usual
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bases = {}
    for seed in read_numbers("seeds", typed["seeds"]):
        if seed >= SEEDS["clean"]:
            raise UserError(f"seeds={seed}: from {SEEDS['clean']} on they are the texts that perplexity is measured on")
        for factor, of_factor in levels.items():
            for level in of_factor:
                base = Base(factor, level, seed)
                bases.setdefault(base.name, base)
    write_shared(output)
    calls = [(make_start, seed, output, size) for seed in dict.fromkeys(base.seed for base in bases.values())]
    calls += [(make_base, base, output, size) for base in bases.values()]  # later: no worker waits for another's start
    call_all(calls, workers)
    print(f"{len(bases)} bases in {output / 'bases'}")


def call_all(calls: Sequence[tuple[Any, ...]], workers: int) -> None:
    """Call each function with what follows it, in this order, in processes; the first error ends all."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for made in [pool.submit(*call) for call in calls]:
                made.result()
        except BaseException:  # else the pool would first do all that waits
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():
                worker.terminate()
            raise


if __name__ == "__main__":
    run_entry_point(main, resumes=True)
