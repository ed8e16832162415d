"""Training rows for the NLG experiments: load, put into the Alpaca frame, tokenize, label the response alone.

Every set is read from the hub by name or from a local json, jsonl or parquet file of the same columns:

    toy           generated (data/toy.py)
    metamathqa    query, response                    meta-math/MetaMathQA
    codefeedback  query, answer                      m-a-p/CodeFeedback-Filtered-Instruction
    wizardlm      conversations (first exchange)     WizardLMTeam/WizardLM_evol_instruct_V2_196k
    gsm8k         question, answer (ends "#### N")   openai/gsm8k
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.config.schema_nlg import NLGDataConfig
from ba_lora.errors import UserError
from ba_lora.objective.regularizers import IGNORE_INDEX
from ba_lora.paths import resolve_data
from ba_lora.prompts import build_prompt
from ba_lora.rows import choose_rows, load_rows
from data import manifest
from data.tokenized import tokenize_once

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingSet:
    """Where a set lives, the columns it needs, and how a row becomes (instruction, response)."""

    hub: str | None
    columns: tuple[str, ...]
    to_pair: Callable[[dict[str, Any]], tuple[str, str]]
    subset: str | None = None


def _metamathqa_pair(row: dict[str, Any]) -> tuple[str, str]:
    return row["query"], row["response"]


def _codefeedback_pair(row: dict[str, Any]) -> tuple[str, str]:
    return row["query"], row["answer"]


def _wizardlm_pair(row: dict[str, Any]) -> tuple[str, str]:
    """Return the first human turn and the answer to it; ("", "") where the conversation does not start that way."""
    turns = row["conversations"]
    if len(turns) < 2 or turns[0].get("from") != "human" or turns[1].get("from") != "gpt":
        return "", ""
    return turns[0]["value"], turns[1]["value"]


def _gsm8k_pair(row: dict[str, Any]) -> tuple[str, str]:
    """Drop the calculator notes (<<48/2=24>>) and end with "The answer is: N" as MetaMathQA does."""
    solution = re.sub(r"<<[^<>]*>>", "", row["answer"])
    return row["question"], re.sub(r"####\s*(.+?)\s*$", r"The answer is: \1", solution)


SOURCES = {
    "toy": TrainingSet(None, ("query", "response"), _metamathqa_pair),
    "metamathqa": TrainingSet("meta-math/MetaMathQA", ("query", "response"), _metamathqa_pair),
    "codefeedback": TrainingSet("m-a-p/CodeFeedback-Filtered-Instruction", ("query", "answer"), _codefeedback_pair),
    "wizardlm": TrainingSet("WizardLMTeam/WizardLM_evol_instruct_V2_196k", ("conversations",), _wizardlm_pair),
    "gsm8k": TrainingSet("openai/gsm8k", ("question", "answer"), _gsm8k_pair, subset="main"),
}


@dataclass(frozen=True)
class TrainingData:
    """The tokenized rows (input_ids, labels, length, and `row`, their number here) and what became of the raw ones;
    `heldout`: those that are kept out of training (`data.heldout_share`), None where there are none."""

    dataset: "Dataset"
    report: dict[str, Any]
    heldout: "Dataset | None" = None


def load_training_data(config: NLGDataConfig, tokenizer: "PreTrainedTokenizerBase") -> TrainingData:
    """Return the rows `config` names, tokenized.

    Labels are −100 but on the response and its EOS. A row longer than `max_length` is cut (it then has no EOS); a row
    of which nothing of the response would be left is dropped. Both are counted in the report, as are rows without text.
    Raises UserError for a missing or empty file, wrong columns, a broken line, an absent set, or when no row is left.
    """
    rows, origin = _read_rows(config)
    source = SOURCES[config.name]
    checked = manifest.check_rows(config.name, config.split, rows, source.columns, file_sha256=origin["file_sha256"])
    num_read = len(rows)
    rows = choose_rows(rows, config.num_rows, config.sample_seed)
    pairs, empty = [], 0
    for row in rows:
        try:
            instruction, response = source.to_pair(row)
            instruction, response = instruction.strip(), response.strip()
        except (AttributeError, TypeError, KeyError) as error:
            raise UserError(
                f"{origin['source']}: a row's {', '.join(source.columns)} is not text: {row!r:.120}"
            ) from error
        if instruction and response:
            pairs.append((instruction, response))
        else:
            empty += 1
    encoded = tokenize_once(pairs, encode, tokenizer, max_length=config.max_length) if pairs else ()
    if not len(encoded):
        raise UserError(
            f"no row of {origin['source']} is left to train on: all {len(rows)} are empty or their prompt alone fills "
            f"data.max_length={config.max_length}; raise data.max_length or check the file"
        )
    heldout = None
    if config.heldout_share:
        encoded, heldout = _hold_out(encoded, config.heldout_share)
    report = {
        "name": config.name,
        **origin,
        "rows_read": num_read,
        "rows_chosen": len(rows),
        "rows_used": len(encoded),
        "rows_cut": sum(encoded["cut"]),
        "rows_dropped": len(pairs) - len(encoded) - len(heldout or ()),
        "rows_empty": empty,
        "rows_heldout": len(heldout or ()),
        "sha256": checked["sha256"],
        "manifest": checked["status"],
        "tokens": sum(encoded["length"]),
        "response_tokens": sum(encoded["response_length"]),
    }
    if heldout is not None:
        heldout = heldout.remove_columns(["response_length", "cut"])
    dataset = encoded.remove_columns(["response_length", "cut"]).add_column("row", list(range(len(encoded))))
    return TrainingData(dataset, report, heldout)


def _hold_out(rows: "Dataset", share: float) -> tuple["Dataset", "Dataset"]:
    """Return the rows for training and the held-out ones, at least one each; they are the same for every seed."""
    number = round(share * len(rows))
    if not 0 < number < len(rows):
        raise UserError(
            f"data.heldout_share={share} of {len(rows)} rows are {number}: at least one row must be held out, and one "
            "be left to train on"
        )
    held = set(random.Random(0).sample(range(len(rows)), number))
    return rows.select([row for row in range(len(rows)) if row not in held]), rows.select(sorted(held))


def encode(
    instruction: str, response: str, tokenizer: "PreTrainedTokenizerBase", *, max_length: int
) -> dict[str, Any] | None:
    """Return input_ids, labels, length, response_length (EOS counts) and cut for one row, or None where `max_length`
    leaves nothing of the response.

    One space joins prompt and response (the paper is silent; its evaluation prompts go on with a space too).
    """
    prompt = build_prompt(instruction)
    prompt_ids = tokenizer(prompt)["input_ids"]
    eos = [tokenizer.eos_token_id]
    if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text with EOS
        prompt_ids, eos = prompt_ids[:-1], []
    input_ids = tokenizer(f"{prompt} {response}")["input_ids"] + eos
    if (
        input_ids[: len(prompt_ids)] != prompt_ids
    ):  # a token spans the seam: generation will start from the prompt's ids
        input_ids = prompt_ids + tokenizer(f" {response}", add_special_tokens=False)["input_ids"]
        input_ids.append(tokenizer.eos_token_id)
    if len(prompt_ids) >= max_length:
        return None
    cut = len(input_ids) > max_length
    input_ids = input_ids[:max_length]
    labels = [IGNORE_INDEX] * len(prompt_ids) + input_ids[len(prompt_ids) :]
    response_length = len(input_ids) - len(prompt_ids)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "length": len(input_ids),
        "response_length": response_length,
        "cut": cut,
    }


def check_source(config: NLGDataConfig) -> None:
    """Raise UserError where a set has neither a place on the hub nor a file: found before a run's folder is made."""
    if config.source is None and config.name != "toy" and SOURCES[config.name].hub is None:
        raise UserError(f"data.name={config.name} is no set of the hub's: name its file, data.source=FILE")


def _read_rows(config: NLGDataConfig) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    source = SOURCES[config.name]
    if config.name == "toy" and config.source is None:
        from data import toy

        settings = config.toy
        try:
            rows = toy.generate_problems(
                num_rows=config.num_rows,
                seed=settings.seed,
                split="finetune",
                label_noise=settings.label_noise,
                noisy_families=tuple(settings.noisy_families),
                imbalance=settings.imbalance,
            )
        except ValueError as error:
            raise UserError(f"data.toy: {error}") from error
        return rows, {"source": "generated by data/toy.py", "revision": None, "file_sha256": None}
    check_source(config)
    name, revision = config.source or source.hub, config.revision
    if config.source is None:
        revision = revision or manifest.pinned_revision(config.name)
    name = resolve_data(name)
    if revision and not Path(name).is_absolute():
        name = f"{name}@{revision}"
    rows, where = load_rows(name, split=config.split, configs=lambda hub: (source.subset,))
    origin = {"source": where.name, "revision": where.revision, "file_sha256": where.sha256}
    found = sorted(rows[0])
    missing = [column for column in source.columns if column not in found]
    if missing:
        raise UserError(
            f"{name} has the columns {', '.join(found)}; data.name={config.name} needs {', '.join(source.columns)}: "
            "choose the matching data.name, or rename the columns"
        )
    for number, row in enumerate(rows):
        if any(column not in row for column in source.columns):
            raise UserError(f"{name}, row {number} lacks a column: {', '.join(source.columns)} are needed in every row")
    return rows, origin
