"""What a reasoning model writes before its answer is no answer: it is cut before anything is read from a text.

Everything up to the last closing mark goes, also where the opening mark stood in the prompt, and so does what begins
with an opening mark and never ends: the model was cut off. Where nothing is left behind the last closing mark, the
answer is what stands before the thinking that it ends.
"""

from ba_lora.errors import UserError

THINKING = "<think> </think>"  # opening and closing mark
NONE = "none"


def cut_thinking(text: str, marks: str = THINKING) -> str:
    """Return the answer behind the thinking. marks: opening and closing mark with a blank between, or "none"."""
    if marks == NONE:
        return text
    opening, closing = marks.split()
    *before, last = text.split(closing)
    parts = [last, *(part for part in reversed(before) if opening in part)]
    return next((answer for part in parts if (answer := part.partition(opening)[0]).strip()), "")


def check_marks(key: str, marks: str) -> None:
    """Raise UserError, naming the option `key`, unless `marks` are two marks or "none"."""
    if marks != NONE and len(marks.split()) != 2:
        raise UserError(f"{key}={marks!r}: two marks with a blank between are needed, e.g. '{THINKING}', or none")
