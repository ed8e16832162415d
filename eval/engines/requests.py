"""What a model is asked: the options of a call, the prompts of a task, and whether completions that are there answer
just that already."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ba_lora.chat import ChatTemplate, is_chat, read_template
from ba_lora.errors import UserError
from ba_lora.io import sha256_file, sha256_json
from ba_lora.prompts import build_conversation, build_prompt, prompt_hash, template_stops
from ba_lora.rows import is_commit
from eval.completions import read_meta
from eval.engines import base as engines
from eval.engines.base import Completion, EngineOptions, Sampling
from eval.engines.serving import SERVE, ServedModel, run_base
from eval.grading.thinking import THINKING, check_marks, cut_thinking
from eval.tasks.base import Item, Source, Task


@dataclass(frozen=True)
class GenerateOptions:
    """What `key=value` can set; None: the task's or the engine's own."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    num_samples: int | None = None
    seed: int = 0
    limit: int | None = None
    template: str | None = None
    batch_size: int | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    attention: str = "sdpa"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    revision: str | None = None
    trust_remote_code: bool = False
    serve: str = "auto"
    thinking: str = THINKING
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.serve not in SERVE:
            raise UserError(f"serve={self.serve} is unknown: choose one of {', '.join(SERVE)}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}: it must be at least 1")
        check_marks("thinking", self.thinking)
        temperature = self.temperature if self.temperature is not None else float((self.num_samples or 1) > 1)
        self.sampling(max_new_tokens=1, stop=(), temperature=temperature)  # checks the values

    def sampling(
        self,
        *,
        max_new_tokens: int,
        stop: tuple[str, ...],
        temperature: float,
        top_p: float = 1.0,
        num_samples: int = 1,
    ) -> Sampling:
        """Return the settings for items whose defaults are given. Greedy by request means one sample by default."""
        if self.temperature == 0:
            num_samples = 1
        return Sampling(
            max_new_tokens=self.max_new_tokens if self.max_new_tokens is not None else max_new_tokens,
            temperature=self.temperature if self.temperature is not None else temperature,
            top_p=self.top_p if self.top_p is not None else top_p,
            num_samples=self.num_samples if self.num_samples is not None else num_samples,
            stop=stop,
            seed=self.seed,
        )

    def engine(self) -> EngineOptions:
        """Return what the engine is told."""
        shared = {entry.name for entry in dataclasses.fields(EngineOptions)}
        return EngineOptions(**{name: value for name, value in vars(self).items() if name in shared})


@dataclass(frozen=True)
class Questions:
    """What one task asks.

    instructions[i]: of items[i], after those of the turns before it; earlier[i]: the places of those turns in `items`;
    samplings[i]: how to draw items[i]; thinking: the marks around what a reasoning model writes before its answer,
    which is no part of the conversation that the next turn sees.
    """

    task: Task
    source: Source
    items: list[Item]
    instructions: list[list[str]]
    earlier: list[list[int]]
    samplings: list[Sampling]
    template: str
    thinking: str
    chat: ChatTemplate | None = None

    def of_base(self, base: str, options: EngineOptions, *, text: str | None = None) -> "Questions":
        """Return these questions as a base is asked them: in its own chat template (or `text`, another one), where
        `template` asks for that. Raises UserError where it has none, or refuses a conversation."""
        if not is_chat(self.template):
            return self
        tokenizer = engines.load_base_tokenizer(base, options)
        text = text or (None if self.template == "chat" else read_template(self.template))
        asked = dataclasses.replace(self, chat=ChatTemplate(tokenizer, name=self.template, text=text))
        asked.chat.end_id  # noqa: B018  a template that ends no answer is told before the model is loaded
        for instructions in self.instructions:
            asked.conversation(instructions, [""] * (len(instructions) - 1))
        return asked

    def conversation(self, instructions: Sequence[str], responses: Sequence[str]) -> str:
        """Return the prompt for the last of `instructions`, after the earlier ones and the responses to them."""
        if self.chat is None:
            return build_conversation(instructions, responses, template=self.template)
        return self.chat.next_prompt(instructions, responses)

    @property
    def prompt_hash(self) -> str:
        """The template's hash."""
        return self.chat.hash if self.chat else prompt_hash(template=self.template)

    def prompts(self, index: int, answers: Sequence[Sequence[Completion]]) -> list[str]:
        """Return the prompts of items[index], given the completions so far: one, or one for each sample of the turn
        before."""
        turns = self.earlier[index]
        if not turns:
            return [self.conversation(self.instructions[index], [])]
        return [
            self.conversation(
                self.instructions[index], [cut_thinking(answer.text, self.thinking) for answer in history]
            )
            for history in zip(*(answers[turn] for turn in turns), strict=True)
        ]


def template_and_stops(task: Task, options: GenerateOptions) -> tuple[str, tuple[str, ...]]:
    """Return the template and the strings that end an answer. Raises UserError for an unknown template."""
    template = options.template if options.template is not None else task.template
    if is_chat(template):
        if template != "chat":
            read_template(template)
        return template, ()  # it ends with the template's own end token
    stop = template_stops(template)
    if stop is None:
        build_prompt("", template=template)  # an unknown template is told before a model is loaded
        stop = tuple(task.stop)
    return template, stop


def load_questions(task: Task, data: str | None, options: GenerateOptions) -> Questions:
    """Load a task's items and decide on their prompts and sampling."""
    items, source = task.load(data)
    items = task.select(items)[: options.limit]
    template, stop = template_and_stops(task, options)
    places = {item.task_id: place for place, item in enumerate(items)}
    earlier: list[list[int]] = []
    for item in items:
        before = [] if item.follows is None else [places[item.follows]]
        earlier.append([*earlier[before[0]], *before] if before else [])
    samplings = [
        options.sampling(
            max_new_tokens=task.max_new_tokens,
            stop=stop,
            temperature=task.temperature(item),
            top_p=task.top_p,
            num_samples=task.num_samples,
        )
        for item in items
    ]
    instructions = [[items[place].instruction for place in [*turns, index]] for index, turns in enumerate(earlier)]
    return Questions(task, source, items, instructions, earlier, samplings, template, options.thinking)


def request_sha256(model: ServedModel, questions: Questions, kind: str, options: GenerateOptions) -> str | None:
    """Return a hash of what decides the answers of the engine `kind`; None where the weights may change unseen.

    How a run is served, as an adapter or merged, counts only as far as `options` asks for it: the weights are the same.
    """
    weights = weights_state(model)
    if weights is None:
        return None
    turns = any(questions.earlier)
    request = {
        "weights": weights,
        "engine": [kind, engines.GENERATION_VERSION, engines.device_kind(), *engines.package_versions(kind)],
        "options": {
            key: value for key, value in vars(options).items() if key not in ("overwrite", "limit", "thinking")
        },
        **({"thinking": questions.thinking} if turns else {}),
        "task": [questions.task.name, questions.template, *([questions.chat.hash] if questions.chat else [])],
        "choices": {key: questions.task.choice(key) for key in questions.task.choices},
        "data": [questions.source.name, questions.source.as_result()],  # the record beside the answers names the data
        "items": [item.task_id for item in questions.items],
        "prompts": [
            questions.conversation(instructions, [""] * (len(instructions) - 1))
            for instructions in questions.instructions
        ],
        "samplings": [dataclasses.astuple(sampling) for sampling in questions.samplings],
    }
    return sha256_json(request)


def weights_state(model: ServedModel) -> list[Any] | None:
    """Return what says that weights have changed, None for a branch of the hub, which moves.

    Of a run: its training, the files of its exports, its base. Of other models: a hub commit, or a folder's files.
    """
    needs_base = model.run is None or model.adapter is not None
    if needs_base and not Path(model.base).is_dir() and not is_commit(model.revision):
        return None
    if model.run is not None:
        base, revision = run_base(model.run)
        training = model.run / "train.json"
        trained = sha256_file(training) if training.is_file() else None
        folders = [model.run / name for name in ("adapter", "lora", "merged")]
        return ["run", trained, _files(folders), base, revision, _files([Path(base)] if base else [])]
    return [
        "model",
        model.base,
        model.revision,
        _files([Path(model.base), *([model.adapter] if model.adapter else [])]),
    ]


def _files(folders: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return path, size and time of change of the folders' files; their cards, written after each scoring, aside."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.name != "README.md"]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]


def held_record(folder: Path, task: str, request: str | None) -> dict[str, Any] | None:
    """Return the meta record of completions in `folder` that answer this very request and are whole, else None."""
    completions = folder / f"{task}.jsonl"
    if request is None or not completions.is_file():
        return None
    try:
        record = read_meta(completions)
    except UserError:
        return None  # damaged: made again, with the completions
    whole = record.get("request_sha256") == request and record.get("completions_sha256") == sha256_file(completions)
    return record if whole else None
