"""Prompt templates, shared by training and evaluation, and their fingerprint.

Training, GSM8K and MATH use the Alpaca instruction frame without input, as the paper does; the response follows
"### Response:". Every result stores `prompt_hash`, so that scores made with different prompts are never compared
unnoticed. MT-Bench asks a second question after the first answer: `build_conversation`.
"""

import difflib
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

from ba_lora.errors import UserError

ALPACA_INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA = ALPACA_INTRODUCTION + "\n\n### Instruction:\n{instruction}\n\n### Response:"
# The frame of Alpaca's rows that have an input (Taori et al., 2023).
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:"
)
STEP_BY_STEP = " Let's think step by step."  # what the official GSM8K and MATH evaluators append

CODE_BLOCK = "\n```python\n"  # the official HumanEval evaluator begins the response inside a code block

TEMPLATES = {
    "alpaca": ALPACA,
    "alpaca_step_by_step": ALPACA + STEP_BY_STEP,
    "alpaca_code_block": ALPACA + CODE_BLOCK,
}

# Conversations in the form that a published chat model was trained on: template=fschat/vicuna_v1.1 and its kin, from
# the conversation module of fschat (the FastChat package).
FSCHAT = "fschat/"
# Some of fschat's templates begin with the text of a BOS token, which the tokenizer adds too.
_BOS_TEXTS = ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>")


def build_prompt(instruction: str, *, template: str = "alpaca", context: str = "") -> str:
    """Return `instruction` inside the frame named `template`: a key of `TEMPLATES`, or "fschat/NAME".

    context: Alpaca's input, for its own frame. Raises UserError (a ValueError) for an unknown template.
    """
    if context.strip():
        assert template == "alpaca", "no other frame has an input"
        before, _, after = ALPACA_WITH_INPUT.partition("{input}")
        return before.replace("{instruction}", instruction.strip()) + context.strip() + after
    return build_conversation([instruction], [], template=template)


def build_conversation(instructions: Sequence[str], responses: Sequence[str], *, template: str = "alpaca") -> str:
    """Return the prompt for the last of `instructions`, after the earlier ones and the model's `responses` to them.

    In an Alpaca frame the introduction comes once, and each further turn is a blank line and the frame's own
    "### Instruction" and "### Response". One space joins a response to its frame, as in training. The frame has no
    published form for a second turn, and single-turn training has none either; no end-of-text token is put between
    the turns, since its text differs between tokenizers.
    Raises UserError for an unknown template.
    """
    if len(responses) != len(instructions) - 1:
        raise ValueError(f"{len(instructions)} instructions need {len(instructions) - 1} responses")
    if template.startswith(FSCHAT):
        return _fschat_prompt(instructions, responses, template=template)
    frame = _frame(template)
    prompt = frame.replace("{instruction}", instructions[0].strip())
    turn = "\n\n" + frame.removeprefix(ALPACA_INTRODUCTION).lstrip("\n")
    for instruction, response in zip(instructions[1:], responses, strict=True):
        prompt += f" {response.strip()}" + turn.replace("{instruction}", instruction.strip())
    return prompt


def template_stops(template: str) -> tuple[str, ...] | None:
    """Return the texts at which fschat ends a response in this template; None where the task's own stops hold.

    The template's stop_token_ids are not needed: engines end at every token that the model itself names as an end.
    """
    if not template.startswith(FSCHAT):
        return None
    stop = _fschat_template(template).stop_str
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def prompt_hash(*, template: str = "alpaca") -> str:
    """Return the first 12 hex digits of the template's sha256 (of fschat's: of a sample conversation's)."""
    if template.startswith(FSCHAT):
        text = _fschat_prompt(["{instruction}", "{instruction}"], ["{response}"], template=template)
    else:
        text = _frame(template)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _frame(template: str) -> str:
    if template not in TEMPLATES:
        raise UserError(
            f"unknown prompt template {template!r}: choose one of {', '.join(sorted(TEMPLATES))}, or {FSCHAT}NAME"
        )
    return TEMPLATES[template]


def _fschat_prompt(instructions: Sequence[str], responses: Sequence[str], *, template: str) -> str:
    conversation = _fschat_template(template).copy()
    for index, instruction in enumerate(instructions):
        conversation.append_message(conversation.roles[0], instruction.strip())
        answer = responses[index].strip() if index < len(responses) else None
        conversation.append_message(conversation.roles[1], answer)
    prompt = conversation.get_prompt()
    return next((prompt.removeprefix(bos) for bos in _BOS_TEXTS if prompt.startswith(bos)), prompt)


@functools.cache
def _fschat_template(template: str) -> Any:
    """Return fschat's conversation of that name. Raises UserError where there is none, or where it makes no text."""
    try:
        from fastchat.conversation import SeparatorStyle, conv_templates
    except ImportError as error:
        raise UserError(f"template={template} needs fschat: pip install -r requirements.txt") from error
    name = template.removeprefix(FSCHAT)
    # templates without a text form (chatgpt, claude's successors, …) are for models behind an API
    usable = sorted(key for key, value in conv_templates.items() if isinstance(value.sep_style, SeparatorStyle))
    if name not in usable:
        near = difflib.get_close_matches(name, usable, n=3, cutoff=0.4) or usable
        raise UserError(f"fschat has no conversation template {name!r} for local models: choose e.g. {', '.join(near)}")
    return conv_templates[name]
