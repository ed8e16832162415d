"""Conversations as tokens with labels: −100 but on the answers and their end tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ba_lora.chat import ChatTemplate
from ba_lora.objective.regularizers import IGNORE_INDEX
from ba_lora.prompts import build_prompt
from data.conversations import Conversation, as_exchange, for_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoder:
    """How conversations become tokens: in the Alpaca frame, or by a chat template."""

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    chat: ChatTemplate | None = None

    def check(self, conversation: Conversation, where: str) -> None:
        """Raise UserError for a conversation that the Alpaca frame has no room for, before anything is tokenized."""
        if self.chat is None and conversation:
            as_exchange(conversation, where)

    def __call__(self, conversation: Conversation, number: int, source: str) -> dict[str, Any] | None:
        """Return `encode` of row `number`, or None where `max_length` leaves nothing of an answer. Raises UserError
        where the chat template refuses the row, or would label other tokens than its answers."""
        where = f"{source}, row {number}"
        if self.chat is None:
            instruction, context, response = as_exchange(conversation, where)
            return encode(instruction, response, self.tokenizer, max_length=self.max_length, context=context)
        messages = for_chat(conversation)
        ids, learned = self.chat.encode(messages, where)
        if self.chat.has_mask:
            self.chat.check_mask(messages, ids, learned, where)
        return _labelled(ids, learned, self.max_length)


def encode(
    instruction: str, response: str, tokenizer: "PreTrainedTokenizerBase", *, max_length: int, context: str = ""
) -> dict[str, Any] | None:
    """Return input_ids, labels, length, response_length (EOS counts) and cut for one row in the Alpaca frame, or None
    where `max_length` leaves nothing of the response. context: Alpaca's input.

    One space joins prompt and response (the paper is silent; its evaluation prompts go on with a space too).
    """
    prompt = build_prompt(instruction, context=context)
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
    learned = [False] * len(prompt_ids) + [True] * (len(input_ids) - len(prompt_ids))
    return _labelled(input_ids, learned, max_length)


def _labelled(input_ids: list[int], learned: list[bool], max_length: int) -> dict[str, Any] | None:
    cut = len(input_ids) > max_length
    input_ids, learned = input_ids[:max_length], learned[:max_length]
    if not any(learned):
        return None
    return {
        "input_ids": input_ids,
        "labels": [token if label else IGNORE_INDEX for token, label in zip(input_ids, learned, strict=True)],
        "length": len(input_ids),
        "response_length": sum(learned),
        "cut": cut,
    }
