"""The pre-trained model's tokenizer, and texts as it encodes them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ba_lora.chat import is_chat, read_template
from ba_lora.config.schema import ModelConfig
from ba_lora.errors import UserError
from ba_lora.models.source import hub_errors, model_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(config: ModelConfig, *, generates: bool = True, template: str = "chat") -> "PreTrainedTokenizerBase":
    """Return the model's tokenizer, right-padded; without a pad token of its own it pads with EOS.

    template: `data.template`; a file becomes the tokenizer's chat template, and is exported with it.
    `generates`: the model ends its texts itself, so an EOS token must be there; else it is a classifier's, which takes
    pairs, too.
    Padding with EOS is safe here: labels and attention mask are made from lengths, never from token values.
    """
    from transformers import AutoTokenizer

    with hub_errors(config.name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_source(config), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if generates and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {config.name} has no EOS token: generation could never stop; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if is_chat(template) and template != "chat":
        tokenizer.chat_template = read_template(template)
    tokenizer.padding_side = "right"
    if not generates:
        _separate_pairs(tokenizer)
    return tokenizer


def _separate_pairs(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make a tokenizer that puts two texts side by side with nothing between them, as GPT-2's, put its EOS there.

    Without it nobody could tell where the first text ends. The paper is silent; a delimiter token is what Radford et
    al. 2018 put between two texts, and EOS is the one that GPT-2 knows. It stands in the exported tokenizer, too.
    """
    from tokenizers import processors

    if tokenizer.num_special_tokens_to_add(pair=True):
        return
    end = tokenizer.eos_token
    if end is None:
        raise UserError("the tokenizer has neither a form for pairs nor an EOS token to put between two texts: set one")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair=f"$A {end} $B", special_tokens=[(end, tokenizer.eos_token_id)]
    )


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[tuple[str, ...]], *, max_length: int
) -> tuple[dict[str, list[list[int]]], int]:
    """Return the tokenizer's columns for texts or pairs, cut to `max_length` tokens (the longer text of a pair first),
    and how many were cut. A text without tokens, as an empty one is to GPT-2, becomes one EOS: models need a position.
    """
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = dict(tokenizer(*columns, truncation=True, max_length=max_length))
    for index, ids in enumerate(encoded["input_ids"]):
        if not ids:
            encoded["input_ids"][index], encoded["attention_mask"][index] = [tokenizer.eos_token_id], [1]
    full = [index for index, ids in enumerate(encoded["input_ids"]) if len(ids) == max_length]
    if not full:
        return encoded, 0
    uncut = tokenizer(*([column[index] for index in full] for column in columns), verbose=False)
    return encoded, sum(len(ids) > max_length for ids in uncut["input_ids"])
