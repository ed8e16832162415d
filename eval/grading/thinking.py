"""What a reasoning model writes before its answer is no answer: it is cut before anything is read from a text.

Everything up to the last closing mark goes, also where the opening mark stood in the prompt. Thinking that begins the
text and never ends leaves nothing: the model was cut off before it answered.
"""

from ba_lora.errors import UserError

THINKING = "<think> </think>"  # opening and closing mark
NONE = "none"


def cut_thinking(text: str, marks: str = THINKING) -> str:
    """Return the answer behind the thinking. marks: opening and closing mark with a blank between, or "none"."""
    if marks == NONE:
        return text
    opening, closing = marks.split()
    answer = text.rpartition(closing)[2]
    return "" if answer.lstrip().startswith(opening) else answer


def check_marks(key: str, marks: str) -> None:
    """Raise UserError, naming the option `key`, unless `marks` are two marks or "none"."""
    if marks != NONE and len(marks.split()) != 2:
        raise UserError(f"{key}={marks!r}: two marks with a blank between are needed, e.g. '{THINKING}', or none")
