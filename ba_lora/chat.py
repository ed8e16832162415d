"""Conversations in the form of a chat template, and which of their tokens are a model's answers.

A chat template is a Jinja text: the tokenizer's own, or a file of the user's in the same variables (messages,
add_generation_prompt, bos_token, eos_token). It writes all special tokens itself, BOS too: nothing is added to it.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.errors import UserError, in_one_line
from ba_lora.io import open_text, reading_errors
from ba_lora.paths import resolve_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]  # {"role": system, user or assistant; "content": text}

# What Llama 3's templates write where nobody gives a date; else a prompt would change from day to day.
_DATE = "26 Jul 2024"


def is_chat(template: str) -> bool:
    """Whether a template's name means a chat template: `chat`, or a file."""
    return template == "chat" or Path(template).suffix in (".jinja", ".jinja2", ".j2")


def read_template(file: str) -> str:
    """Return the text of a Jinja file. Raises UserError where it is absent or no valid template."""
    import jinja2

    path = resolve_path(file)
    with open_text(path) as opened, reading_errors(path):
        text = opened.read()
    if not text.strip():
        raise UserError(f"{path} is empty: a Jinja template is needed")
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation(text))
    except jinja2.TemplateError as error:
        raise UserError(f"{path} is no valid Jinja template: {in_one_line(error)}") from error
    return text


def text_hash(text: str) -> str:
    """Return the first 12 hex digits of a template's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _without_generation(text: str) -> str:
    """Return a template without transformers' own tag around a model's answers, which only transformers parses."""
    return re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", text)


class ChatTemplate:
    """A chat template with the tokenizer that reads its text.

    name: as in the configuration, `chat` or a file; text: the Jinja text, None: the tokenizer's own. Raises UserError
    where the tokenizer has none.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, name: str = "chat", text: str | None = None) -> None:
        text = text or getattr(tokenizer, "chat_template", None)
        if isinstance(text, dict):
            text = text.get("default")
        if not text:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template: use an instruct model's, "
                "data.template=alpaca, or data.template=FILE.jinja"
            )
        if not tokenizer.is_fast:
            raise UserError(
                f"template={name}: the tokenizer of {tokenizer.name_or_path} has no fast form, which tells where each "
                "token stands in the text: use data.template=alpaca"
            )
        self.tokenizer, self.name, self.text = tokenizer, name, text
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        words = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        if not words:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no special token that could end an answer")
        self._special_ids = set(tokenizer.convert_tokens_to_ids(words))
        self._special = re.compile("|".join(map(re.escape, words)))
        self._end = re.compile(rf"\s*({self._special.pattern})")

    @property
    def hash(self) -> str:
        """The first 12 hex digits of the template's sha256."""
        return text_hash(self.text)

    @functools.cached_property
    def end_id(self) -> int:
        """The token with which an answer ends."""
        return self.tokenizer.convert_tokens_to_ids(self._end_word)

    @functools.cached_property
    def _end_word(self) -> str:
        """The special token behind an answer: the same at a conversation's end and before a further question, else it
        may be what opens the next turn. Raises UserError where it is not."""
        question = {"role": "user", "content": "a"}
        talk = [question, {"role": "assistant", "content": "b"}]
        text, ((_, _, end, last),) = self._find_answers(talk, "a probe")
        if text == self.prompt(talk) and self._special.sub("", text[end:]).strip():
            raise UserError(
                f"template={self.name} opens a further answer behind every conversation: write that only "
                "{% if add_generation_prompt %}"
            )
        try:
            _, ((*_, inner),) = self._find_answers([*talk, question], "a probe")
        except UserError:  # a template for one exchange; rows of several are refused by themselves
            return last
        if inner != last:
            raise UserError(
                f"template={self.name} ends the last answer with {last!r}, and has {inner!r} between an answer and a "
                "further question, which may belong to that question: let it write {{ eos_token }} behind each answer"
            )
        return last

    def prompt(self, messages: Messages) -> str:
        """Return the text after which the model writes its next answer. Raises UserError with the template's reason."""
        return self._render(messages, prompt=True)

    def next_prompt(self, instructions: Sequence[str], responses: Sequence[str]) -> str:
        """Return `prompt` for the last of the instructions, after the earlier ones and the responses to them."""
        messages = [{"role": "user", "content": instructions[0].strip()}]
        for response, instruction in zip(responses, instructions[1:], strict=True):
            messages.append({"role": "assistant", "content": response.strip()})
            messages.append({"role": "user", "content": instruction.strip()})
        return self.prompt(messages)

    def _render(self, messages: Messages, *, prompt: bool = False) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=prompt,
                date_string=_DATE,
            )
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"template={self.name} refuses a conversation of {roles}: {in_one_line(error)}; change the rows or "
                "the template"
            ) from error

    def spans(self, messages: Messages, where: str) -> tuple[str, list[tuple[str, int, int]]]:
        """Return the conversation's text, and for each answer the text before it and where it starts and ends, its end
        token included. `where` names the row in errors.

        The text before an answer is exactly what the model is asked with, so an earlier turn that the template changes
        later on (a thinking block it cuts out) is refused: the model would learn what it is never asked.
        """
        text, answers = self._find_answers(messages, where)
        for number, (*_, word) in enumerate(answers, start=1):
            if word != self._end_word:
                raise UserError(
                    f"{where}: template={self.name} ends answer {number} with {word!r} and others with "
                    f"{self._end_word!r}: use another template"
                )
        return text, [(prompt, start, end) for prompt, start, end, _ in answers]

    def _find_answers(self, messages: Messages, where: str) -> tuple[str, list[tuple[str, int, int, str]]]:
        """Return `spans`, each with the special token at its end."""
        text, found = self._render(messages), []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, content = self.prompt(messages[:place]), message["content"].strip()
            if not text.startswith(prompt):
                raise UserError(
                    f"{where}: template={self.name} writes what stands before answer {len(found) + 1} in another way "
                    "than it asks for that answer: use another template"
                )
            start = text.find(content, len(prompt))
            if start < 0 or self._special.search(text, len(prompt), start):
                raise UserError(
                    f"{where}: template={self.name} changes answer {len(found) + 1} of the conversation, as templates "
                    "do that cut out thinking: take the thinking out of the rows, or use data.exchanges=1"
                )
            end = self._end.match(text, start + len(content))
            if end is None:
                raise UserError(
                    f"{where}: template={self.name} ends an answer with no special token, so that the model would "
                    "never stop: let it write {{ eos_token }} behind each answer"
                )
            found.append((prompt, len(prompt), end.end(1), end[1]))
        return text, found

    def encode(self, messages: Messages, where: str) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and which of them are an answer's or its end token. Raises UserError.

        Where a token spans the seam between prompt and answer, the parts are tokenized apart, as generation will see
        the prompt.
        """
        text, spans = self.spans(messages, where)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        learned = [False] * len(ids)
        for prompt, _, end in spans:
            before = self._ids(prompt)
            last = next((i for i in range(len(before), len(ids)) if offsets[i][1] >= end), None)
            if ids[: len(before)] != before or last is None or ids[last] not in self._special_ids:
                return self._encode_apart(text, spans)
            learned[len(before) : last + 1] = [True] * (last + 1 - len(before))
        return ids, learned

    def _encode_apart(self, text: str, spans: Sequence[tuple[str, int, int]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        learned: list[bool] = []
        done = 0
        for _, start, end in [*spans, ("", len(text), len(text))]:
            for part, is_answer in ((text[done:start], False), (text[start:end], True)):
                more = self._ids(part) if part else []
                ids += more
                learned += [is_answer] * len(more)
            done = end
        return ids, learned

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @functools.cached_property
    def has_mask(self) -> bool:
        """Whether the template marks the answers itself ({% generation %})."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None

    def check_mask(self, messages: Messages, ids: list[int], learned: list[bool], where: str) -> None:
        """Raise UserError where the template's own mask marks other tokens as answers than `encode` did. Free are only
        the end token, which some leave out, and blanks and special tokens around an answer, which some mark, too."""
        own: dict[str, Any] = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.text,
            return_dict=True,
            return_assistant_tokens_mask=True,
            date_string=_DATE,
        )
        if own["input_ids"] != ids:
            return  # tokenized apart
        marked = [bool(mark) for mark in own["assistant_masks"]]
        for place, (ours, theirs) in enumerate(zip(learned, marked, strict=True)):
            if ours == theirs or (ours and ids[place] in self._special_ids):
                continue
            blank = ids[place] in self._special_ids or not self.tokenizer.decode([ids[place]]).strip()
            around = slice(max(place - 1, 0), place + 2)
            if theirs and blank and sum(marked[around]) + sum(learned[around]) > 1:
                continue
            raise UserError(
                f"{where}: template={self.name} marks other tokens as answers than those behind its prompts, the first "
                f"{self.tokenizer.decode([ids[place]])!r} at place {place}: its {{% generation %}} block is wrong"
            )


def load_chat(tokenizer: "PreTrainedTokenizerBase", template: str) -> ChatTemplate | None:
    """Return the chat template that `data.template` or `template=` names; None for the frames of ba_lora/prompts.py.

    Raises UserError for an absent or invalid file, and where the tokenizer has no template.
    """
    if not is_chat(template):
        return None
    return ChatTemplate(tokenizer, name=template, text=None if template == "chat" else read_template(template))
