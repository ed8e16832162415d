"""Generate completions: models and tasks in, one jsonl file each out. One engine start serves all tasks and all
adapters of a base.

    python -m eval.generate --model DIR [DIR …] --task gsm8k [TASK …] [--engine auto|vllm|hf] [--data FILE]
                            [--output DIR] [key=value …]

A model is
- a run folder (it has a config.yaml). Runs of one base that are asked for together are served hot, as adapters on that
  base: lora/ where PiSSA made one, else adapter/. A single run, and one whose adapter vLLM cannot serve (full
  fine-tuning, DoRA, AdaLoRA, LoHa, an adapter of fused experts, a 4-bit base), is served from merged/. `serve=merged`
  or `serve=hot` overrides. A run that has neither (bottlenecks, virtual tokens) is its adapter on the base, which only
  transformers serves;
- a PEFT adapter folder, served hot on the base that its adapter_config.json names; RUN/ranks/<b>, a DyLoRA run at one
  rank, keeps its completions there. The adapter/ of a PiSSA run is
  refused: it belongs to changed base weights. So is an adapter whose weights are not those of the layers it names;
- a model folder or a hub id.

The rule does not look at the engine, so that both engines answer with the same weights (served hot in half precision,
vLLM rounds the adapter: 0.2 % of the learned update in bfloat16).

--data is a file for a single task, or TASK=FILE for several. The completions of a run go to
RUN/completions/<task>.jsonl, those of other models to --output DIR/<task>.jsonl (DIR/<model>/<task>.jsonl for several
models). A line is {"task_id", "sample", "prompt", "completion", "finish_reason"}; beside it <task>.meta.json tells
what made the file.

In a task of several turns (mt_bench) the second prompt holds the model's first answer, sample by sample, without a
reasoning model's thinking.

Keys: max_new_tokens (default: the task's), temperature (0 = greedy; default: the task's, greedy for most), top_p and
num_samples (default: the task's), the task's own choices (humaneval: protocol; mbpp: subset), seed, limit (first N
items), template (default: the chat template that a run was trained in, else the task's; a key of
ba_lora.prompts.TEMPLATES; chat for the tokenizer's own chat template; a Jinja file; fschat/NAME for the form of a
published chat model; the last three bring their own ends of an answer), batch_size, dtype (auto, float32, bfloat16,
float16), max_model_len, attention (sdpa, eager, flash_attention_2; hf only), tensor_parallel_size,
gpu_memory_utilization (vllm only), revision, trust_remote_code, serve (auto, hot, merged), thinking
(the marks around thinking, '<think> </think>'; none: nothing is cut), overwrite.

Completions that answer the very same request (weights, data, prompts, settings, engine) are kept, so that the same
command goes on where it was stopped, task by task; overwrite=true makes them again. Those of a hub model without a
commit as its revision always are: its branch may have moved.
"""

import argparse
import collections
import dataclasses
import importlib.metadata
import itertools
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ba_lora.config.checks import check_place
from ba_lora.config.structured import read_typed
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.io import write_json_atomic, write_jsonl_atomic
from ba_lora.models.sizes import check_tokens
from ba_lora.rows import portable_name
from eval.completions import PROMPT_TOO_LONG
from eval.engines import base as engines
from eval.engines.base import Completion, Engine, EngineOptions, Sampling
from eval.engines.open import KINDS, check_engine, choose_engine, open_engine
from eval.engines.requests import (
    GenerateOptions,
    Questions,
    held_record,
    load_questions,
    request_sha256,
    template_and_stops,
)
from eval.engines.serving import ServedModel, kept_template, plan_serving
from eval.options import read_data, split_options
from eval.tasks import TASKS, get_task
from eval.tasks.base import Task


def completion_folders(served: Sequence[ServedModel], output: str | None) -> list[Path]:
    """Return the folder of each model's completions. Raises UserError where a model that is no run has no --output."""
    paths = []
    for model in served:
        if output is None:
            if model.keeps is None:
                found = "is no run folder" if Path(model.name).is_dir() else "is no folder, and so no run"
                raise UserError(f"{model.name} {found}: of any other model say with --output DIR where completions go")
            paths.append(model.keeps / "completions")
        else:
            name = re.sub(r"[^\w.-]+", "-", model.name.strip("/")).strip("-.") or "model"
            paths.append(Path(output) / name if len(served) > 1 else Path(output))
    if len(set(paths)) < len(paths):
        raise UserError("two models would write to the same folder: name them differently, or leave --output out")
    return paths


def needed_length(base: str, all_questions: Sequence[Questions], options: EngineOptions) -> int | None:
    """Return the context that these prompts can use at most (less than the model's own saves vLLM memory).

    Raises UserError for a prompt with a token that the model has no row for.
    """
    config = engines.load_base_config(base, options)
    limit = engines.context_length(config)
    if options.max_model_len is not None:
        limit = min(options.max_model_len, limit or options.max_model_len)
    tokenizer = engines.load_base_tokenizer(base, options)
    longest = 0
    for questions in all_questions:
        unanswered = [
            questions.conversation(instructions, [""] * (len(instructions) - 1))
            for instructions in questions.instructions
        ]
        encoded = engines.encode_prompts(tokenizer, unanswered, chat=questions.chat is not None)
        check_tokens(tokenizer, config.vocab_size, base, encoded)
        for ids, instructions, sampling in zip(encoded, questions.instructions, questions.samplings, strict=True):
            # an answer's text may take a few tokens more in the next prompt than when it was made
            again = (len(instructions) - 1) * (sampling.max_new_tokens + 32)
            longest = max(longest, len(ids) + again + sampling.max_new_tokens)
    return longest if limit is None else min(limit, longest)


def complete(
    engine: Engine, questions: Questions, *, adapter: str | None, progress: str
) -> tuple[list[list[str]], list[list[Completion]]]:
    """Return prompts and completions, items → samples: turn after turn, and within a turn by temperature."""
    prompts: list[list[str]] = [[] for _ in questions.items]
    completions: list[list[Completion]] = [[] for _ in questions.items]
    batches: dict[tuple[int, Sampling], list[int]] = {}
    for index, (turns, sampling) in enumerate(zip(questions.earlier, questions.samplings, strict=True)):
        batches.setdefault((len(turns), sampling), []).append(index)
    for (turn, sampling), indices in sorted(batches.items(), key=lambda batch: batch[0][0]):
        asked = [questions.prompts(index, completions) for index in indices]
        # a first turn is drawn num_samples times; a later one has as many prompts as the turn before has answers
        settings = sampling if turn == 0 else dataclasses.replace(sampling, num_samples=1)
        answers = iter(
            engine.generate(
                [prompt for one in asked for prompt in one],
                adapter=adapter,
                progress=progress,
                **({"chat_end": questions.chat.end_id} if questions.chat else {}),
                **vars(settings),
            )
        )
        for index, one in zip(indices, asked, strict=True):
            completions[index] = [sample for _ in one for sample in next(answers)]
            prompts[index] = one if turn else one * len(completions[index])
    return prompts, completions


def write_completions(
    folder: Path,
    questions: Questions,
    prompts: Sequence[Sequence[str]],
    completions: Sequence[Sequence[Completion]],
    meta: dict,
) -> dict:
    """Write <task>.jsonl, then <task>.meta.json, each atomically; return what the latter says."""
    rows = [
        {
            "task_id": item.task_id,
            "sample": sample,
            "prompt": prompt,
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
        }
        for item, asked, samples in zip(questions.items, prompts, completions, strict=True)
        for sample, (prompt, completion) in enumerate(zip(asked, samples, strict=True))
    ]
    meta_path = folder / f"{questions.task.name}.meta.json"
    meta_path.unlink(missing_ok=True)  # a reader may find completions without meta, never with another's
    meta = meta | {"completions_sha256": write_jsonl_atomic(folder / f"{questions.task.name}.jsonl", rows)}
    write_json_atomic(meta_path, meta)
    return meta


def generation_record(
    model: ServedModel,
    questions: Questions,
    engine: Engine,
    completions: Sequence[Sequence[Completion]],
    seconds: float,
) -> dict:
    """Return what made the completions; counts are over prompts, tokens over all samples."""
    first = [samples[0] for samples in completions]
    return {
        "task": questions.task.name,
        "task_version": questions.task.version,
        "data": questions.source.name,
        "data_sha256": questions.source.as_result(),
        "num_items": len(questions.items),
        "model": recorded_name(model.name),
        "served": model.served,
        "base": recorded_name(model.base),
        "revision": model.revision,
        "engine": engine.kind,
        "engine_version": engine.version,
        "torch_version": importlib.metadata.version("torch"),
        "dtype": engine.dtype,
        "max_model_len": engine.context,
        "choices": {key: questions.task.choice(key) for key in questions.task.choices},
        "template": questions.template,
        "prompt_hash": questions.prompt_hash,
        "thinking": questions.thinking,
        "sampling": describe_sampling(questions),
        "num_prompt_too_long": sum(completion.finish_reason == PROMPT_TOO_LONG for completion in first),
        "num_clamped": sum(completion.clamped for completion in first),
        "num_generated_tokens": sum(completion.num_tokens for samples in completions for completion in samples),
        "seconds": round(seconds, 3),
        "startup_seconds": round(engine.startup_seconds, 3),
    }


def recorded_name(model: str) -> str:
    """Return a model's name as a result keeps it: a folder of this repository by its path inside, a hub id as it is."""
    return portable_name(Path(model)) if Path(model).exists() else model


def describe_sampling(questions: Questions) -> dict:
    """Return the fields of `Sampling`; a temperature that differs between items is given as temperature → items."""
    temperatures = collections.Counter(sampling.temperature for sampling in questions.samplings)
    record = dataclasses.asdict(questions.samplings[0])
    if len(temperatures) > 1:
        record["temperature"] = {str(value): count for value, count in sorted(temperatures.items())}
    return record


def trained_template(served: Sequence[ServedModel]) -> str | None:
    """Return the text of the chat template that all these runs were trained in; None where they are no runs, or were
    trained in the Alpaca frame, of which each task has its own form. Raises UserError where they differ."""
    found = {model.name: kept_template(model.trained_in) for model in served}
    if len(set(found.values())) > 1:
        raise UserError(
            f"{', '.join(found)} were trained in different templates: ask them one by one, or all by template=NAME"
        )
    return next(iter(found.values()), None)


def choose_tasks(names: Sequence[str], choices: Mapping[str, str]) -> list[Task]:
    """Return the tasks, each once, with those of the choices that are its own."""
    return [
        task.configured({key: value for key, value in choices.items() if key in task.choices})
        for task in map(get_task, dict.fromkeys(names))
    ]


def run(
    models: Sequence[str],
    tasks: Sequence[str],
    *,
    engine: str = "auto",
    data: dict[str, str] | None = None,
    output: str | None = None,
    options: GenerateOptions | None = None,
    choices: dict[str, str] | None = None,
) -> list[dict]:
    """Generate for every model and task what is not answered yet; return the records beside the completions.

    data: task → file or hub name, where not the task's own; choices: values of the tasks' own keys. Raises UserError
    for anything wrong, before a model is loaded where it can be known by then.
    """
    options = options if options is not None else GenerateOptions()
    check_engine(engine)
    chosen = choose_tasks(tasks, choices or {})
    served = plan_serving(models, serve=options.serve, revision=options.revision)
    folders = dict(zip(served, completion_folders(served, output), strict=True))
    for folder in folders.values():
        check_place(folder, "--output" if output else "completions")
    text = trained_template(served) if options.template is None else None
    if text is not None:
        options = dataclasses.replace(options, template="chat")
    loaded = [load_questions(task, (data or {}).get(task.name), options) for task in chosen]
    groups: dict[tuple[str, str | None, bool], list[ServedModel]] = {}
    for model in served:
        groups.setdefault((model.base, model.revision, model.needs_transformers), []).append(model)
    records: dict[tuple[ServedModel, str], dict] = {}
    for (base, revision, needs_transformers), members in groups.items():
        settings = dataclasses.replace(options.engine(), revision=revision)
        kind = "hf" if engine == "auto" and needs_transformers else choose_engine(engine, base, settings)
        all_questions = [questions.of_base(base, settings, text=text) for questions in loaded]
        left = []
        for model, questions in itertools.product(members, all_questions):
            request = request_sha256(model, questions, kind, options)
            held = None if options.overwrite else held_record(folders[model], questions.task.name, request)
            if held is None:
                left.append((model, questions, request))
                continue
            records[model, questions.task.name] = held
            answers = folders[model] / f"{questions.task.name}.jsonl"
            print(f"{model.name} {questions.task.name}: answered already → {answers}", flush=True)
        if not left:
            continue
        settings = dataclasses.replace(settings, max_model_len=needed_length(base, all_questions, settings))
        hot = dict.fromkeys(model for model, _, _ in left if model.adapter is not None)
        names = {model: f"adapter{index}" for index, model in enumerate(hot)}
        adapters = {name: model.adapter for model, name in names.items()}
        print(f"generate: starting {kind} on {base}", file=sys.stderr)
        with open_engine(kind, base, adapters=adapters, options=settings) as opened:
            for model, questions, request in left:
                started = time.monotonic()
                progress = f"{model.name} {questions.task.name}"
                prompts, completions = complete(opened, questions, adapter=names.get(model), progress=progress)
                record = generation_record(model, questions, opened, completions, time.monotonic() - started)
                record = record | {"request_sha256": request}
                record = write_completions(folders[model], questions, prompts, completions, record)
                records[model, questions.task.name] = record
                print(summary(record, folders[model]), flush=True)
    return [
        records[model, questions.task.name] for members in groups.values() for model in members for questions in loaded
    ]


def summary(record: dict, folder: Path) -> str:
    """Return the line printed for one model and task."""
    return (
        f"{record['model']} {record['task']}: {record['num_items']} items, {record['num_generated_tokens']} tokens in "
        f"{record['seconds']:.1f} s ({record['engine']}, start {record['startup_seconds']:.1f} s), "
        f"prompts too long {record['num_prompt_too_long']}, clamped {record['num_clamped']} "
        f"→ {folder / record['task']}.jsonl"
    )


def read_command(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Return what a command line asks of `run`. Raises UserError."""
    parser = CommandParser(
        prog="python -m eval.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="DIR", help="run, model or adapter folders, hub ids"
    )
    parser.add_argument("--task", nargs="+", required=True, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--engine", default="auto", help=", ".join(KINDS))
    parser.add_argument("--data", nargs="+", default=[], metavar="TASK=FILE", help="TASK=FILE; of a single task FILE")
    parser.add_argument("--output", metavar="DIR", help="where the completions go; default: into the run folder")
    parser.add_argument("options", nargs="*", metavar="key=value")
    parsed = parser.parse_intermixed_args(arguments)
    (models, tasks, data), moved = split_options(parsed.model, parsed.task, parsed.data)
    if not models or not tasks:
        raise UserError("--model and --task each need at least one name")
    own = {key for name in tasks for key in get_task(name).choices}
    options, choices = read_typed(GenerateOptions, [*parsed.options, *moved], further=own)
    files = read_data(data, tasks)
    asked = {"models": models, "tasks": tasks, "engine": parsed.engine, "data": files, "output": parsed.output}
    return asked | {"options": options, "choices": choices}


def check(arguments: Sequence[str]) -> None:
    """Raise the UserError that the command would end with, as far as no model and no data of the hub is needed."""
    asked = read_command(arguments)
    check_engine(asked["engine"])
    for task in choose_tasks(asked["tasks"], asked["choices"]):
        template_and_stops(task, asked["options"])
        data = asked["data"].get(task.name) or task.default_data()
        if task.name in asked["data"] and Path(data).exists():
            load_questions(task, data, asked["options"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and generate."""
    run(**read_command(arguments))
    return 0


if __name__ == "__main__":
    run_entry_point(main, resumes=True)
