"""What a model has room for: the rows of its embedding, the positions of a learned table.

A token or a position beyond them is an IndexError on a CPU and a device assert on a GPU, so both are told in one line
before anything is trained or generated. The sizes are those of a skeleton: the model's modules without weights.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ba_lora.config.schema import RunConfig
from ba_lora.errors import UserError
from ba_lora.models.source import hub_errors, model_source

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# GPT-2's wpe, BERT's and RoBERTa's position_embeddings, OPT's and BART's embed_positions
_TABLE = re.compile(r"(^|\.)(wpe|position_embeddings?|embed_positions?)$")


def load_skeleton(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False, causal: bool = True
) -> "nn.Module":
    """Return the modules of a model on torch's meta device: names and shapes, no weights; a second for 7B parameters.

    causal: with the head of a language model. Raises UserError in one line.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    code = {"trust_remote_code": True, "code_revision": revision} if trust_remote_code else {}
    with hub_errors(source, "configuration"), _without_zero3(), torch.random.fork_rng([]), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, **hub)
        return (AutoModelForCausalLM if causal else AutoModel).from_config(config, **code)


@contextlib.contextmanager
def _without_zero3() -> Iterator[None]:
    """Keep transformers from splitting the skeleton's weights, which it has none of, over the processes."""
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


def position_limit(model: "nn.Module") -> int | None:
    """Return how many positions the model's learned table has; None where positions come from no table."""
    from torch import nn

    limits = []
    for name, module in model.named_modules():
        if _TABLE.search(name) and isinstance(module, nn.Embedding):
            # OPT and BART leave the first rows free; RoBERTa counts from the row after the padding's
            unused = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            limits.append(module.num_embeddings - unused)
    return min(limits, default=None)


def check_tokens(
    tokenizer: "PreTrainedTokenizerBase", num_embeddings: int, name: str, rows: Iterable[Sequence[int]] = ()
) -> None:
    """Raise UserError where the padding token, or a token of `rows`, has no row in an embedding of that size."""
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= num_embeddings:
        raise UserError(
            f"the padding token {tokenizer.pad_token!r} has id {pad}, but the embedding of {name} has {num_embeddings} "
            "rows: give the tokenizer another padding token (its EOS will do), or resize the model's embedding"
        )
    if max(tokenizer.get_vocab().values(), default=0) < num_embeddings:
        return
    largest = max((max(ids, default=0) for ids in rows), default=0)
    if largest >= num_embeddings:
        raise UserError(
            f"the tokenizer is larger than {name}: {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, "
            f"but the embedding has {num_embeddings} rows: use the model's own tokenizer, or resize its embedding"
        )


def check_sizes(config: RunConfig, tokenizer: "PreTrainedTokenizerBase", *datasets: "Dataset | None") -> None:
    """Raise UserError where the model of a run has no room for a token or for the length of a row it is trained or
    evaluated on."""

    def rows() -> Iterator[list[int]]:  # from the disk, one by one, and only for a model that may lack room
        return (ids for dataset in datasets if dataset is not None for ids in dataset["input_ids"])

    settings = config.model
    model = load_skeleton(
        model_source(settings),
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        causal=config.kind == "nlg",
    )
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    check_tokens(tokenizer, num_embeddings, settings.name, rows())
    limit = position_limit(model)
    if limit is None or config.data.max_length <= limit:
        return
    longest = max(map(len, rows()))
    if longest > limit:
        raise UserError(
            f"a row has {longest} tokens, but {settings.name} has a table of {limit} positions: "
            f"set data.max_length={limit}"
        )
