"""A row of a set becomes a conversation: messages of the roles system, user, input and assistant, texts stripped.

`input` is Alpaca's further context to an instruction. Other roles and other forms are refused with the row's number.
"""

import json
import re
from typing import Any

from ba_lora.errors import UserError
from ba_lora.rows import HALF, is_whole
from data.sets import DataSet

Conversation = list[dict[str, str]]

# as OpenAI, ShareGPT and most sets on the hub call them
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def read_conversation(row: dict[str, Any], of: DataSet, where: str) -> tuple[Conversation, bool]:
    """Return the conversation of one row, an empty list where it holds no question with an answer, and whether turns
    of the row are left out of it.

    Left out are an assistant's turns before the first question, all from the first empty turn of a user or an
    assistant on, and what stands behind the last answer. (Not told: empty system turns, and what `exchanges` cuts off.)
    Raises UserError, naming `where`, for what is no text, no list of turns, or a role that is not known.
    """
    return _of_messages(row, of, where) if of.messages else (_of_columns(row, of, where), False)


def _of_columns(row: dict[str, Any], of: DataSet, where: str) -> Conversation:
    texts = {part: row.get(column) for part, column in of.columns.items()}
    texts["input"] = "" if texts.get("input") is None else texts["input"]
    if not all(isinstance(text, str) for text in texts.values()):
        raise UserError(f"{where}: {', '.join(of.read)} is not text: {row!r:.120}")
    for part, rules in of.replace.items():
        for pattern, text in rules:
            texts[part] = re.sub(pattern, text, texts[part])
    texts = {part: text.strip() for part, text in texts.items()}
    if not texts["instruction"] or not texts["response"]:
        return []
    found = [("user", texts["instruction"]), ("input", texts["input"]), ("assistant", texts["response"])]
    return [{"role": role, "content": text} for role, text in found if text]


def _of_messages(row: dict[str, Any], of: DataSet, where: str) -> tuple[Conversation, bool]:
    turns = row[of.messages]
    if isinstance(turns, str):  # in csv and tsv files
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: {of.messages} is text, but no JSON list of turns: {turns!r:.80}") from error
        if not is_whole(turns):
            raise UserError(f"{where}: {of.messages} {HALF}")
    if not isinstance(turns, list):
        raise UserError(f"{where}: {of.messages} must be a list of turns, found {type(turns).__name__}")
    found: Conversation = []
    answers, has_question, shortened = 0, False, False
    for number, turn in enumerate(turns):
        if of.exchanges is not None and answers == of.exchanges:
            break
        message = _message(turn, f"{where}, turn {number}")
        if not message["content"] and message["role"] == "system":
            continue
        if message["role"] == "assistant" and not has_question:  # ShareGPT's later parts of a long talk begin so
            shortened = True
            continue
        if not message["content"]:  # what stands before it is still a conversation
            shortened = True
            break
        found.append(message)
        has_question |= message["role"] == "user"
        answers += message["role"] == "assistant"
    while found and found[-1]["role"] != "assistant":  # a question without an answer
        found.pop()
        shortened = True
    roles = [message["role"] for message in found if message["role"] != "system"]
    if not roles or (of.exchanges is not None and roles != ["user", "assistant"] * (len(roles) // 2)):
        return [], False
    return found, shortened


def _message(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise UserError(f"{where} is no object of role and content (or from and value): {turn!r:.80}")
    keys = ("role", "content") if "role" in turn else ("from", "value")
    if any(key not in turn for key in keys):
        raise UserError(f"{where} has neither role and content nor from and value; it has {', '.join(map(str, turn))}")
    role, text = turn[keys[0]], turn[keys[1]]
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where}: the role {role!r:.40} is unknown; known are {', '.join(ROLES)}")
    if not isinstance(text, str) or turn.get("tool_calls"):
        raise UserError(f"{where}: {keys[1]} must be text (calls of tools and pictures are not read): {turn!r:.80}")
    return {"role": ROLES[role], "content": text.strip()}


def as_exchange(conversation: Conversation, where: str) -> tuple[str, str, str]:
    """Return (instruction, input, response), the one exchange that the Alpaca frame has room for. Raises UserError for
    a system turn or several exchanges."""
    roles = [message["role"] for message in conversation]
    if "system" in roles:
        raise UserError(f"{where} has a system turn, which the Alpaca frame has no place for: use data.template=chat")
    if roles not in (["user", "assistant"], ["user", "input", "assistant"]):
        raise UserError(
            f"{where} has several exchanges ({', '.join(roles[:6])}), and the Alpaca frame has room for one: use "
            "data.template=chat, or data.exchanges=1"
        )
    texts = {message["role"]: message["content"] for message in conversation}
    return texts["user"], texts.get("input", ""), texts["assistant"]


def for_chat(conversation: Conversation) -> Conversation:
    """Return the messages that a chat template knows: the input stands behind its instruction, after a blank line."""
    found: Conversation = []
    for message in conversation:
        if message["role"] == "input":
            found[-1] = {"role": "user", "content": f"{found[-1]['content']}\n\n{message['content']}"}
        else:
            found.append(dict(message))
    return found
