"""Ask a trained model in the terminal, or two runs side by side.

    python -m eval.chat RUN [RUN] [--turns] [--engine hf|vllm|auto] [key=value …]

RUN is what eval.generate takes: a run's folder, an adapter's or a model's, a hub id. A question is a line; each is put
into the prompt that the run was trained with (its eval.options.template, else the chat template it was trained in, else
the Alpaca frame) and asked by itself;
with --turns the conversation goes on, and /new begins another. /quit or the end of the input leaves. Two runs of one
base share one start of the model. Keys are those of eval.generate, such as max_new_tokens=256 or temperature=0.7;
answers are greedy by default.
"""

import argparse
import contextlib
import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

from ba_lora.chat import ChatTemplate, is_chat, read_template
from ba_lora.config.layers import load_run
from ba_lora.config.structured import read_typed
from ba_lora.console import visible
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.prompts import build_conversation, build_prompt, template_stops
from eval.engines.base import Engine, Sampling, load_base_tokenizer
from eval.engines.open import KINDS, check_engine, choose_engine, open_engine
from eval.engines.requests import GenerateOptions
from eval.engines.serving import ServedModel, kept_template, plan_serving
from eval.tasks.base import ALPACA_STOPS

MAX_NEW_TOKENS = 512
NARROW = 80  # columns of a terminal below which answers stand below each other


@dataclasses.dataclass
class Speaker:
    """A model that is asked: its engine and adapter there, its template and sampling, and the turns so far."""

    name: str
    engine: Engine
    adapter: str | None
    template: str
    sampling: Sampling
    chat: ChatTemplate | None = None  # where the template is a chat template
    turns: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def ask(self, question: str, *, keep: bool) -> str:
        """Return the answer; keep: after the turns before it, and to be one of them."""
        asked, answers = [*(turn[0] for turn in self.turns), question], [turn[1] for turn in self.turns]
        if self.chat is None:
            prompt, further = build_conversation(asked, answers, template=self.template), {}
        else:
            prompt, further = self.chat.next_prompt(asked, answers), {"chat_end": self.chat.end_id}
        ((completion,),) = self.engine.generate([prompt], adapter=self.adapter, **further, **vars(self.sampling))
        if keep:
            self.turns.append((question, completion.text))
        ending = {"length": " […]", "prompt_too_long": "[the conversation is longer than the model's context: /new]"}
        return completion.text.strip() + ending.get(completion.finish_reason or "", "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        prog="python -m eval.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", metavar="RUN", help="one or two run, model or adapter folders, hub ids")
    parser.add_argument("--turns", action="store_true", help="each question goes on with the conversation")
    parser.add_argument("--engine", default="hf", help=", ".join(KINDS))
    parsed = parser.parse_intermixed_args(arguments)
    models = [word for word in parsed.run if "=" not in word]
    options, _ = read_typed(GenerateOptions, [word for word in parsed.run if "=" in word])
    if not 1 <= len(models) <= 2:
        raise UserError(f"give one RUN or two, not {len(models)}")
    if options.num_samples not in (None, 1):
        raise UserError("num_samples: a question gets one answer here; leave it out")
    check_engine(parsed.engine)
    templates = [_template(model, options) for model in models]
    served = plan_serving(models, serve=options.serve, revision=options.revision)
    with contextlib.ExitStack() as stack:
        talk(_open(served, templates, parsed.engine, options, stack), sys.stdin, print, keep=parsed.turns)
    return 0


def _template(model: str, options: GenerateOptions) -> tuple[str, str | None]:
    """Return the template that a model is asked in, and the text of a chat template that is not the tokenizer's own.

    Raises UserError for an unknown template, and for a classifier.
    """
    template = options.template
    if (Path(model) / "config.yaml").is_file():
        config = load_run(Path(model))
        if config.kind == "nlu":
            raise UserError(f"{model} is a classifier and gives labels, no text: see python -m eval.nlu --help")
        template = template or config.eval.options.get("template")
        if template is None and (kept := kept_template(Path(model))) is not None:
            return "chat", kept
    template = template or "alpaca"
    if is_chat(template):
        return template, None if template == "chat" else read_template(template)
    build_prompt("", template=template)
    return template, None


def _open(
    served: Sequence[ServedModel],
    templates: Sequence[tuple[str, str | None]],
    engine: str,
    options: GenerateOptions,
    stack: contextlib.ExitStack,
) -> list[Speaker]:
    """Start an engine for each base; they are closed with `stack`."""
    names = {model: f"adapter{place}" for place, model in enumerate(served) if model.adapter is not None}
    chats: list[ChatTemplate | None] = []
    for model, (template, text) in zip(served, templates, strict=True):
        if not is_chat(template):
            chats.append(None)
            continue
        settings = dataclasses.replace(options.engine(), revision=model.revision)
        chats.append(ChatTemplate(load_base_tokenizer(model.base, settings), name=template, text=text))
        chats[-1].end_id  # noqa: B018  a template that ends no answer is told before the model is loaded
    engines: dict[tuple[str, str | None], Engine] = {}
    for base, revision in dict.fromkeys((model.base, model.revision) for model in served):
        adapters = {name: m.adapter for m, name in names.items() if (m.base, m.revision) == (base, revision)}
        settings = dataclasses.replace(options.engine(), revision=revision)
        kind = choose_engine(engine, base, settings)
        print(f"chat: starting {kind} on {base}", file=sys.stderr)
        engines[base, revision] = stack.enter_context(open_engine(kind, base, adapters=adapters, options=settings))
    return [
        Speaker(
            name=Path(model.name).name or model.name,
            engine=engines[model.base, model.revision],
            adapter=names.get(model),
            template=template,
            sampling=options.sampling(
                max_new_tokens=MAX_NEW_TOKENS,
                stop=() if chat else ALPACA_STOPS if (stops := template_stops(template)) is None else stops,
                temperature=0.0,
            ),
            chat=chat,
        )
        for model, (template, _), chat in zip(served, templates, chats, strict=True)
    ]


def talk(speakers: Sequence[Speaker], lines: Iterable[str], write: Callable[[str], object], *, keep: bool) -> None:
    """Ask every line of all speakers, and write what they answer, until the lines end or one says /quit."""
    write(f"asking {' and '.join(speaker.name for speaker in speakers)}; /new begins again, /quit leaves")
    for line in lines:
        question = line.strip()
        if question == "/quit":
            return
        if question == "/new":
            for speaker in speakers:
                speaker.turns.clear()
            write("a new conversation")
        elif question.startswith("/"):
            write(f"{question.split()[0]} is unknown: /new, /quit")
        elif question:
            answers = [visible(speaker.ask(question, keep=keep)) for speaker in speakers]
            write(
                side_by_side([speaker.name for speaker in speakers], answers, width=shutil.get_terminal_size().columns)
            )


def side_by_side(names: Sequence[str], texts: Sequence[str], *, width: int) -> str:
    """Return texts under their names: of two in columns, where the terminal is wide enough."""
    if len(texts) == 1:
        return f"\n{texts[0]}\n"
    if width < NARROW:
        return "\n".join(f"\n[{name}]\n{text}" for name, text in zip(names, texts, strict=True)) + "\n"
    room = (width - 3) // 2
    columns = [
        [line for part in f"[{name}]\n{text}".split("\n") for line in (textwrap.wrap(part, room) or [""])]
        for name, text in zip(names, texts, strict=True)
    ]
    return "\n" + "\n".join(f"{a:<{room}} │ {b}".rstrip() for a, b in zip_longest(*columns, fillvalue="")) + "\n"


if __name__ == "__main__":
    run_entry_point(main)
