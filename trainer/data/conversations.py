"""Conversations in JSON lines: read, checked, and encoded with the ranges that are learned."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.train import ConfigError, DataError
from trainer.data.chat_template import ROLES, ChatTemplate, Message
from trainer.data.files import FilePart, read_text

FORMS = (
    'every line must be {"messages": [{"role": …, "content": …}, …]} or '
    '{"prompt": …, "completion": …}'
)


@dataclass(frozen=True)
class Conversation:
    """One conversation, and the first message whose answers are learned."""

    messages: list[Message]
    learned_from: int  # answers before this message are not learned
    place: str  # file and line

    @property
    def answers(self) -> list[int]:
        """Return the indices of the messages to learn."""
        return [
            number
            for number, message in enumerate(self.messages)
            if message["role"] == "assistant" and number >= self.learned_from
        ]


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids, and the ranges of them to learn."""

    ids: list[int]
    learned: list[tuple[int, int]]


def read_conversations(part: FilePart) -> Iterator[Conversation]:
    """Yield the conversation of each line; blank lines are skipped.

    Raises DataError, naming file and line, for what is no conversation.
    """
    before = _count_lines(part.path, part.start)
    for number, line in enumerate(_read_lines(part), before + 1):
        if line.strip():
            yield _parse_line(line, f"line {number} of {part.path}")


def encode_conversation(template: ChatTemplate, talk: Conversation) -> EncodedConversation:
    """Return the ids of a conversation up to its last answer, and what of them is learned.

    An answer is what follows in ids on the messages before it and the beginning of an answer: its
    content and the end of its turn. Raises DataError if these are no prefix of the conversation.
    """
    ids: list[int] = []
    learned = []
    for number in talk.answers:
        try:
            prompt = template.encode(talk.messages[:number], add_generation_prompt=True)
            upto = template.encode(talk.messages[: number + 1])
        except ConfigError as error:
            raise DataError(f"data.path: {talk.place}: {error}") from error
        for head, whole, what in (
            (ids, prompt, f"messages 1 to {number} with the beginning of an answer"),
            (prompt, upto, f"messages 1 to {number + 1}"),
        ):
            if whole[: len(head)] != head:
                raise DataError(
                    f"data.path: {talk.place}: the tokens of what comes before an answer are no "
                    f"prefix of {what}: the chat template changes earlier messages, so that what "
                    "is learned would not be what is generated; set data.chat_template to one that "
                    "only appends"
                )
        ids = upto
        learned.append((len(prompt), len(upto)))
    return EncodedConversation(ids, learned)


def _parse_line(line: str, place: str) -> Conversation:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"data.path: {place} is not JSON ({error}); {FORMS}") from error
    keys = sorted(values) if isinstance(values, dict) else []
    if "messages" in keys:
        messages = _check_messages(values["messages"], "messages", place)
        return Conversation(messages, 0, place)
    if "prompt" in keys and "completion" in keys:
        prompt = _as_messages(values["prompt"], "user", "prompt", place)
        completion = _as_messages(values["completion"], "assistant", "completion", place)
        return Conversation(prompt + completion, len(prompt), place)
    found = f"has the keys {', '.join(keys)}" if keys else f"is {_kind(values)}"
    raise DataError(f"data.path: {place} {found}; {FORMS}")


def _as_messages(value: Any, role: str, key: str, place: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _check_messages(value, key, place)


def _check_messages(value: Any, key: str, place: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"data.path: {place}: {key} is {_kind(value)}; it must be a list of messages"
        )
    return [_check_message(message, f"{key}[{i}]", place) for i, message in enumerate(value)]


def _check_message(message: Any, key: str, place: str) -> Message:
    where = f"data.path: {place}: {key}"
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(f"{where} is {_kind(message)}; it must have a role and a content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise DataError(f"{where}.role={role!r} must be one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where}.content is {_kind(content)}; it must be text")
    for name, more in message.items():
        if name not in ("role", "content") and more not in (None, [], {}, ""):
            raise DataError(f"{where}.{name} is not supported; leave it out: only text is read")
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    if isinstance(value, list | dict | str) and not value:
        return "empty"
    if isinstance(value, dict):
        return f"an object of {', '.join(sorted(value))}"
    return {list: "a list", str: "text", type(None): "null"}.get(type(value), repr(value))


def _read_lines(part: FilePart) -> Iterator[str]:
    rest: list[str] = []
    for block in read_text(part):
        first, *more = block.split("\n")
        rest.append(first)
        for line in more:
            yield "".join(rest)
            rest = [line]
    yield "".join(rest)


def _count_lines(path: Path, end: int) -> int:
    with path.open("rb") as file:
        return file.read(end).count(b"\n")
