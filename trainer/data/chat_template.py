"""Conversations as token ids, by the tokenizer's own chat template."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainer.config.train import ConfigError, DataConfig
from trainer.data.tokenizer import Tokenizer

Message = dict[str, str]  # role and content
ROLES = ("system", "user", "assistant")
# Values of data.chat_template. `plain` is for any tokenizer: the end token is the only marker.
TEMPLATES = {
    "plain": (
        "{% for message in messages %}{{ message['role'] + '\\n' + message['content'] | trim + "
        "eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
    )
}
HIDDEN = 0xF0000  # first of the private characters that stand for special tokens in a message


class ChatTemplate:
    """A chat template with its tokenizer: messages → token ids.

    The ids are those of transformers' `apply_chat_template`, except where a message spells a
    special token: there it is text, so that no message can end its turn or begin another.
    """

    def __init__(self, tokenizer: Tokenizer, source: str):
        self._tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is not valid jinja: {error}") from error
        self._special = sorted(tokenizer.special_tokens(), key=len, reverse=True)
        self._names = tokenizer.named_tokens()

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        """Return the token ids of messages, and of the beginning of an answer if asked for.

        Raises ConfigError if the template refuses them.
        """
        text, forged = self._render(messages, add_generation_prompt)
        return self._tokenizer.encode_markup(text, forged)

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered text, and the ranges in it where a message spells a special token."""
        hidden = [self._hide(message) for message in messages]
        try:
            text = self._template.render(
                messages=hidden,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._names,
            )
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"the chat template refuses a conversation: {error}") from error
        parts, forged, length = [], [], 0
        for part in re.split(f"([{chr(HIDDEN)}-{chr(HIDDEN + len(self._special))}])", text):
            shown = part
            if len(part) == 1 and 0 <= (number := ord(part) - HIDDEN) < len(self._special):
                shown = self._special[number]
                forged.append((length, length + len(shown)))
            parts.append(shown)
            length += len(shown)
        return "".join(parts), forged

    def _hide(self, message: Message) -> Message:
        content = message["content"]
        for number, token in enumerate(self._special):
            content = content.replace(token, chr(HIDDEN + number))
        return {**message, "content": content}


def find_template(config: DataConfig, tokenizer: Tokenizer) -> str:
    """Return the chat template of data.chat_template, or the tokenizer's own.

    Raises ConfigError if there is none.
    """
    if bundled := TEMPLATES.get(config.chat_template):
        return bundled
    if config.chat_template:
        try:
            return Path(config.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"data.chat_template={config.chat_template} cannot be read ({error}); it must be a "
                "jinja file, plain, or empty for the tokenizer's own"
            ) from error
    if template := tokenizer.files.chat_template():
        return template
    raise ConfigError(
        "data.chat_template is empty, and the tokenizer brings no chat template "
        "(chat_template.jinja, or chat_template in tokenizer_config.json); set "
        "data.chat_template=plain, or a jinja file"
    )


class _Generation(Extension):
    """`{% generation %}` around an answer, for loss masks of others: what is inside is shown."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
