"""The model organism for classifiers: encoders tuned once on rows of which some labels follow a wrong rule.

    python -m data.lab_nlu noise=0,20,40 seeds=1,2,3,4,5 [workers=2] [output=outputs/lab_nlu]
    python -m data.lab_nlu noise=0,20,40 seeds=1,2,3,4,5 task=sst2 train=FILE test=FILE[,FILE]

A base is a pre-trained encoder (`base=`, a file of configs/nlu) that was fine-tuned as a whole, head included, in two
parts, as data/lab.py's: the first on clean rows, done once a seed, the second once a level. Of the second part's rows
of the noisy kinds a share, in percent, has the label that the wrong rule gives, the opposite one. The experiment then
tunes such a base on clean rows of the same classes. So the head stays: it is in the base's folder, and every method
starts from it.

Each kind of row has a role (ROLES): corrected and uncorrected kinds are noisy in the base; fine-tuning has clean rows
of the corrected and the tuned ones. Where the rows come from:

    toy_pairs   self-made (data/toy_nlu.py); the kind is what was done to the premise. The two uncorrected kinds have a
                corrected sibling each: synonym ~ passive (the event in other words), negation ~ opposite (its denial)
    sst2        files of SST-2's columns; the kind is the word for what is reviewed: film (uncorrected), movie
                (corrected), any other. Four parts of `train`, by the sentence's hash, are for the bases' two parts,
                fine-tuning and validation; all of `test` (such as SST-2's dev set and IMDB's sentences) is for
                measuring

Written below output/<task>, and kept there: starts/b<seed>/ and bases/noise-<level>-b<seed>/ (level 0:
bases/clean-b<seed>/), each a model folder with lab.json, a base also with its predictions for the rows below; and
finetune.jsonl, test.jsonl, valid.jsonl (kinds that were always clean), whose rows also tell `kind`, `role` and `wrong`,
the label by the wrong rule. Bases of one seed have the same rows in the same order: they differ by the labels only. A
base that is there is kept.
"""

import hashlib
import json
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.config.layers import load_config
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.glue import find_task
from ba_lora.io import folder_atomic, read_jsonl, sha256_file, write_json_atomic, write_jsonl_atomic
from ba_lora.locks import locked
from ba_lora.paths import PROJECT_ROOT, resolve_data, written_path
from ba_lora.rows import load_rows
from ba_lora.words import check_choice, read_numbers, take_options
from data.lab import call_all, is_made, read_workers, say
from data.tiny_llama import train
from data.toy_nlu import LABELS, generate_pairs

if TYPE_CHECKING:
    from ba_lora.config.schema_nlu import NLUConfig

Row = dict[str, Any]

ROLES = {
    "toy_pairs": {
        "corrected": ("passive", "opposite"),
        "uncorrected": ("synonym", "negation"),
        "tuned": ("part", "detail", "colour", "place"),
        "unseen": ("other_fact", "number"),  # number has the sentence form of synonym, and the other label
    },
    "sst2": {"corrected": ("movie",), "uncorrected": ("film",), "tuned": ("other",), "unseen": ()},
}
ROLE_OF = {task: {kind: role for role, kinds in of.items() for kind in kinds} for task, of in ROLES.items()}
_ENTAILMENT, _NEUTRAL, _CONTRADICTION = range(len(LABELS))
WRONG = {  # label → the wrong rule's; neutral is in no noisy kind, its entry is for measuring only
    "toy_pairs": {_ENTAILMENT: _CONTRADICTION, _NEUTRAL: _CONTRADICTION, _CONTRADICTION: _ENTAILMENT},
    "sst2": {0: 1, 1: 0},
}
BASES = {"toy_pairs": "toy", "sst2": "minilm"}  # of configs/nlu

NUM_ROWS = {"toy_pairs": {"start": 1600, "base": 800}, "sst2": {"start": 3200, "base": 1600}}  # of the two parts
NUM_FINETUNE, NUM_VALID = 480, 160
NUM_ITEMS = {"corrected": 80, "uncorrected": 100, "tuned": 24, "unseen": 24}  # a kind of toy_pairs in test.jsonl
NOISY_SHARE = 0.4  # of the noisy kinds in the rows of sst2, about as of toy_pairs; less where they run out
PART_SHARES = {"start": 3, "base": 3, "finetune": 3, "valid": 1}  # tenths of sst2's training file
SEEDS = {"finetune": 0, "test": 0, "valid": 1}
FIRST_SEEDS = {"start": 1000, "base": 2000}  # of the pairs; the base's seed is added
MAX_SEED = 999

SETTINGS = {
    "batch": 16, "learning_rate": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.01, "warmup": 0.06, "clip": 1.0,
}  # fmt: skip
LEAST_ACCURACY = 0.7  # of a base, in the kinds that are always clean


@dataclass(frozen=True)
class LabRows:
    """The rows of one task, each with its kind; train, test: files, for sst2."""

    task: str = "toy_pairs"
    train: str | None = None
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("task", self.task, tuple(ROLES))
        needs = self.task != "toy_pairs"
        if needs != (self.train is not None) or needs != bool(self.test):
            fix = "give train=FILE and test=FILE" if needs else "leave train= and test= out: its rows are made"
            raise UserError(f"task={self.task}: {fix}")

    def role(self, row: Row) -> str:
        return ROLE_OF[self.task][row["kind"]]

    def of_start(self, seed: int) -> list[Row]:
        """Return the rows of the first part, all clean."""
        if self.task == "toy_pairs":
            return self._drawn_pairs("start", seed)
        rows = self._sentences("start")
        random.Random(f"lab_nlu/{seed}/start").shuffle(rows)
        return rows[: NUM_ROWS[self.task]["start"]]

    def of_base(self, seed: int, level: int) -> list[Row]:
        """Return the rows of the second part, `level` percent of the noisy kinds' labels wrong."""
        found = []
        for index, row in enumerate(self._drawn(seed)):
            drawn = random.Random(f"lab_nlu/{seed}/{index}").random()
            is_wrong = self.role(row) in ("corrected", "uncorrected") and drawn < level / 100
            found.append(row | {"label": WRONG[self.task][row["label"]] if is_wrong else row["label"]})
        return found

    def _drawn(self, seed: int) -> list[Row]:
        if self.task == "toy_pairs":
            return self._drawn_pairs("base", seed)
        return self._mixed(self._sentences("base"), NUM_ROWS[self.task]["base"], seed=f"{seed}/base")

    def _mixed(self, rows: list[Row], number: int, *, seed: str) -> list[Row]:
        """Return `number` rows of sst2, NOISY_SHARE of them of noisy kinds as far as there are some."""
        random.Random(f"lab_nlu/{seed}").shuffle(rows)
        noisy = [row for row in rows if self.role(row) in ("corrected", "uncorrected")]
        noisy = noisy[: min(round(NOISY_SHARE * number), round(0.9 * len(noisy)))]  # each seed leaves out others
        drawn = [*noisy, *[row for row in rows if self.role(row) == "tuned"][: number - len(noisy)]]
        random.Random(f"lab_nlu/{seed}/order").shuffle(drawn)
        return drawn

    def shared(self) -> dict[str, list[Row]]:
        """Return the rows of finetune.jsonl, test.jsonl and valid.jsonl."""
        is_pairs = self.task == "toy_pairs"
        if is_pairs:
            tuning = self._pairs(4 * NUM_FINETUNE, seed=SEEDS["finetune"], split="train")
            test = self._pairs(4000, seed=SEEDS["test"], split="test")
            test = list(_at_most(test, {kind: NUM_ITEMS[role] for kind, role in ROLE_OF[self.task].items()}))
            valid = self._pairs(1000, seed=SEEDS["valid"], split="test")
        else:
            tuning, valid = self._sentences("finetune"), self._sentences("valid")
            test = [row for name in self.test for row in self._read(name)]
        tuning = [row for row in tuning if self.role(row) in ("corrected", "tuned")]
        used = {self._text(row) for row in test}
        found = {
            "finetune": tuning[:NUM_FINETUNE] if is_pairs else self._mixed(tuning, NUM_FINETUNE, seed="finetune"),
            "test": test,
            "valid": [row for row in valid if self.role(row) in ("tuned", "unseen") and self._text(row) not in used],
        }
        found["valid"] = found["valid"][:NUM_VALID]
        for role in ("corrected", "uncorrected", "tuned"):  # told before a base is trained
            if not any(self.role(row) == role for row in test):
                kinds = ", ".join(ROLES[self.task][role])
                raise UserError(f"test={','.join(self.test)}: it has no row of the kind {kinds}: give another file")
        return {
            name: [row | {"role": self.role(row), "wrong": WRONG[self.task][row["label"]]} for row in rows]
            for name, rows in found.items()
        }

    def _drawn_pairs(self, part: str, seed: int) -> list[Row]:
        return self._pairs(NUM_ROWS[self.task][part], seed=FIRST_SEEDS[part] + seed, split="train")

    def _text(self, row: Row) -> tuple[str, ...]:
        return tuple(row[column] for column in find_task(self.task).columns)

    def _pairs(self, num_rows: int, *, seed: int, split: str) -> list[Row]:
        rows = generate_pairs(num_rows=num_rows, seed=seed, split=split)
        return [{key: row[key] for key in ("premise", "hypothesis", "label", "kind")} for row in rows]

    def _sentences(self, part: str) -> list[Row]:
        """Return the rows of one part of the training file; a sentence is in one part, wherever it stands."""
        first = 0
        for name, tenths in PART_SHARES.items():
            if name == part:
                break
            first += tenths
        chosen = range(first, first + PART_SHARES[part])
        rows = self._read(self.train)
        return [row for row in rows if int(hashlib.sha256(row["sentence"].encode()).hexdigest()[:8], 16) % 10 in chosen]

    def _read(self, name: str) -> list[Row]:
        rows, source = load_rows(str(resolve_data(name)), split="train")
        found = []
        for index, row in enumerate(rows):
            sentence, label = row.get("sentence"), find_task("sst2").label_id(row.get("label"))
            if not isinstance(sentence, str) or label is None:
                raise UserError(
                    f"{source.name}, row {index}: sentence and label (0 or 1) are needed, as SST-2 has them"
                )
            found.append({"sentence": sentence, "label": label, "kind": kind_of(sentence)})
        return found


def kind_of(sentence: str) -> str:
    """Return the word for what is reviewed: film where it occurs, else movie, else other."""
    words = set(re.findall(r"\w+", sentence.lower()))
    return "film" if words & {"film", "films"} else "movie" if words & {"movie", "movies"} else "other"


def _at_most(rows: Sequence[Row], most: dict[str, int]) -> Iterator[Row]:
    """Yield the rows of a kind until there are so many."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row["kind"]] += 1
        if counts[row["kind"]] <= most[row["kind"]]:
            yield row


# ---- the bases


def folder_of(output: Path, seed: int, level: int) -> Path:
    """Return the folder of a base."""
    return output / "bases" / (f"noise-{level}-b{seed}" if level else f"clean-b{seed}")


def make_classifier_start(rows: LabRows, seed: int, output: Path, *, words: Sequence[str] = (), base: str = "") -> Path:
    """Return the folder of a seed's first part, trained where it is not there; see `make_classifier`."""
    folder = output / "starts" / f"b{seed}"
    _make(folder, rows, rows.of_start(seed), output, _config(rows, seed, base, words), predicted={})
    return folder


def make_classifier(
    rows: LabRows, seed: int, level: int, output: Path, *, words: Sequence[str] = (), base: str = ""
) -> None:
    """Train a base on one thread, its first part included, and write its folder; one that is there is kept. The rows of
    `shared` are in `output`.

    words: key=value over configs/nlu/<base>.yaml. Raises UserError for a folder of another recipe.
    """
    start = make_classifier_start(rows, seed, output, words=words, base=base)
    config = _config(rows, seed, base, [*words, f"model.name={start}", "model.revision=null"])
    predicted = {name: sha256_file(output / f"{name}.jsonl") for name in ("test", "valid")}
    _make(folder_of(output, seed, level), rows, rows.of_base(seed, level), output, config, predicted=predicted)


def _config(rows: LabRows, seed: int, base: str, words: Sequence[str]) -> "NLUConfig":
    words = [*words, f"task={rows.task}", f"seed={seed}"]
    return load_config(f"configs/nlu/{base or BASES[rows.task]}.yaml", method="full_ft", overrides=words, kind="nlu")


def _make(
    folder: Path, rows: LabRows, trained_on: list[Row], output: Path, config: "NLUConfig", *, predicted: dict[str, str]
) -> None:
    from ba_lora.models.source import model_identity

    text = json.dumps(trained_on, ensure_ascii=False)
    recipe = {
        "name": folder.name,
        "seed": config.seed,
        "settings": {**SETTINGS, "betas": list(SETTINGS["betas"]), "max_length": config.data.max_length},
        "corpus_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "start": model_identity(config.model),
        "predicted": predicted,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), doing=f"trains {folder.name}", made=folder, wait=True):
        if not is_made(folder, recipe):
            _train(folder, recipe, rows, trained_on, output, config)


def _train(
    folder: Path, recipe: dict[str, Any], rows: LabRows, trained_on: list[Row], output: Path, config: "NLUConfig"
) -> None:
    import torch
    from datasets import Dataset
    from transformers import DataCollatorWithPadding

    from ba_lora.models.classifier import load_classifier
    from ba_lora.models.predict import predict, prediction_lines
    from ba_lora.models.tokenizer import encode_texts, load_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(config.seed)  # of dropout; the head's is load_classifier's
    tokenizer, model = load_tokenizer(config.model, generates=False), load_classifier(config)
    collate = DataCollatorWithPadding(tokenizer)
    columns = find_task(rows.task).columns

    def encoded(of: Sequence[Row]) -> Dataset:
        texts = [tuple(row[column] for column in columns) for row in of]
        return Dataset.from_dict(encode_texts(tokenizer, texts, max_length=config.data.max_length)[0])

    train_rows = encoded(trained_on).add_column("labels", [row["label"] for row in trained_on])
    size = SETTINGS["batch"]
    batches = [range(start, min(start + size, len(train_rows))) for start in range(0, len(train_rows), size)]
    trained = train(
        model,
        lambda step: collate([train_rows[index] for index in batches[step]]),
        num_steps=len(batches),
        settings=SETTINGS,
        say=lambda line: say(f"{folder.name}: {line}"),
    )
    facts: dict[str, Any] = {"recipe": recipe}
    with folder_atomic(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        for name, sha256 in recipe["predicted"].items():
            asked = read_jsonl(output / f"{name}.jsonl")
            logits = predict(model, encoded(asked), collate, batch_size=64, pooled=False).logits
            ids, labels = [f"{name}/{index}" for index in range(len(asked))], [row["label"] for row in asked]
            write_jsonl_atomic(prediction_path(temporary, sha256), prediction_lines(ids, labels, logits))
            if name == "test":
                facts |= _measured(asked, logits.softmax(-1))
        facts |= {"sha256": sha256_file(temporary / "model.safetensors"), **trained}
        write_json_atomic(temporary / "lab.json", facts)
    if "accuracy" not in facts:
        say(f"{folder.name}: first part done, {trained['cpu_seconds']} s of CPU")
        return
    enough = "enough" if facts["accuracy"] >= LEAST_ACCURACY else f"TOO LOW, {LEAST_ACCURACY:.0%} are needed"
    say(
        f"{folder.name}: {facts['accuracy']:.1%} right in the clean kinds ({enough}); p(wrong rule) "
        f"{facts['p_wrong']:.1%} in the uncorrected ones; {trained['cpu_seconds']} s of CPU"
    )


def _write_shared(shared: dict[str, list[Row]], output: Path) -> None:
    """Write the rows that all bases share. Raises UserError, before it writes, where bases were made with others."""
    if any(output.glob("bases/*/lab.json")):
        for name, rows in shared.items():
            path = output / f"{name}.jsonl"
            if not path.is_file() or read_jsonl(path) != rows:
                raise UserError(
                    f"{output / 'bases'} has bases that were made with another {path.name}: give the files of then, or "
                    "another output=DIR"
                )
    for name, rows in shared.items():
        write_jsonl_atomic(output / f"{name}.jsonl", rows)


def prediction_path(folder: Path, sha256: str) -> Path:
    """Return where a base's predictions for the rows of a file with this hash are, for eval/likelihood_nlu.py."""
    return folder / "predictions" / f"{sha256[:12]}.jsonl"


def _measured(rows: Sequence[Row], p_ND: Any) -> dict[str, float]:
    """Return right answers in the clean kinds and the mean p(wrong rule) of the uncorrected ones."""
    clean = [
        float(p.argmax() == row["label"])
        for row, p in zip(rows, p_ND, strict=True)
        if row["role"] in ("tuned", "unseen")
    ]
    wrong = [float(p[row["wrong"]]) for row, p in zip(rows, p_ND, strict=True) if row["role"] == "uncorrected"]
    return {"accuracy": sum(clean) / len(clean), "p_wrong": sum(wrong) / len(wrong)}


def main() -> None:
    parser = CommandParser(prog="python -m data.lab_nlu", description="Make classifiers that learned a wrong rule.")
    parser.add_argument("words", nargs="+", metavar="key=value", help="noise=0,20,40 seeds=1,2 [task= train= test=]")
    keys = ("noise", "seeds", "workers", "output", "task", "train", "test", "base")
    typed, rest = take_options(parser.parse_args().words, keys, example="noise=0,20,40")
    if rest or "noise" not in typed or "seeds" not in typed:
        found = f", found {' '.join(rest)}" if rest else ""
        raise UserError(f"noise=0,20,40 and seeds=1,2 are needed{found}; the keys are {', '.join(keys)}")
    workers, levels = read_workers(typed), list(dict.fromkeys(read_numbers("noise", typed["noise"])))
    if any(level > 100 for level in levels):
        raise UserError(f"noise={typed['noise']}: percentages from 0 to 100 are needed")
    test = tuple(name for name in typed.get("test", "").strip("[]").split(",") if name)
    rows = LabRows(typed.get("task", "toy_pairs"), typed.get("train"), test)
    seeds = list(dict.fromkeys(read_numbers("seeds", typed["seeds"])))
    if any(seed > MAX_SEED for seed in seeds):
        raise UserError(f"seeds={typed['seeds']}: seeds from 0 to {MAX_SEED} are needed, or the two parts share rows")
    output = (written_path(typed["output"]) if "output" in typed else PROJECT_ROOT / "outputs" / "lab_nlu") / rows.task
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _write_shared(rows.shared(), output)
    options = {"base": typed.get("base", "")}
    calls = [(partial(make_classifier_start, **options), rows, seed, output) for seed in seeds]
    bases = [(partial(make_classifier, **options), rows, seed, level, output) for seed in seeds for level in levels]
    call_all([*calls, *bases], workers)
    print(f"{len(bases)} bases in {output / 'bases'}")


if __name__ == "__main__":
    run_entry_point(main, resumes=True)
