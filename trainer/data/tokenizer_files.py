"""The files beside a tokenizer.json that say how a model uses its tokenizer."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.train import ConfigError

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CONFIG = "config.json"
TEMPLATE = "chat_template.jinja"
# Kept with a run beside its tokenizer.json, so that it can be exported again.
SIDE_FILES = (TOKENIZER_CONFIG, GENERATION_CONFIG, TEMPLATE, "special_tokens_map.json")


@dataclass(frozen=True)
class TokenizerFiles:
    """The texts of the files that lie beside a tokenizer.json, by name; those that there are."""

    folder: Path
    texts: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> "TokenizerFiles":
        """Read them; raises ConfigError if one is not text.

        The end tokens that config.json alone names become a generation_config.json.
        """
        found = {name: text for name in SIDE_FILES if (text := _read_text(folder / name))}
        if not _value(folder, found, GENERATION_CONFIG, "eos_token_id"):
            model = {MODEL_CONFIG: text} if (text := _read_text(folder / MODEL_CONFIG)) else {}
            ends = _value(folder, model, MODEL_CONFIG, "eos_token_id")
            if ends is not None:
                values = _object(folder, found, GENERATION_CONFIG) | {"eos_token_id": ends}
                found[GENERATION_CONFIG] = json.dumps(values, indent=2) + "\n"
        return cls(folder, found)

    def with_template(self, template: str) -> "TokenizerFiles":
        """Return them with another chat template."""
        return TokenizerFiles(self.folder, {**self.texts, TEMPLATE: template})

    def write(self, folder: Path, write: Callable[[Path, str], None]) -> None:
        """Write the files into a folder by `write(path, text)`."""
        for name, text in self.texts.items():
            write(folder / name, text)

    def meaning(self) -> bytes:
        """Return what decides the end and the beginning of a text; empty if nothing is said."""
        names = (TOKENIZER_CONFIG, GENERATION_CONFIG)
        return "".join(self.texts.get(name, "") for name in names).encode()

    def tokenizer_value(self, name: str) -> Any:
        """Return a value of tokenizer_config.json, None if it is not given; a token as its text."""
        value = _value(self.folder, self.texts, TOKENIZER_CONFIG, name)
        return value.get("content") if isinstance(value, dict) else value

    def generation_value(self, name: str) -> Any:
        """Return a value of generation_config.json, None if it is not given."""
        return _value(self.folder, self.texts, GENERATION_CONFIG, name)

    def end_ids(self, vocab_size: int) -> list[int]:
        """Return the `eos_token_id` of generation_config.json, one or several; empty if none.

        Raises ConfigError for what is no token id.
        """
        value = _value(self.folder, self.texts, GENERATION_CONFIG, "eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise ConfigError(
                    f"{self.folder}: eos_token_id={value} must be token ids from 0 to "
                    f"{vocab_size - 1}, those of tokenizer.json"
                )
        return list(dict.fromkeys(ids))

    def chat_template(self) -> str:
        """Return the template of conversations; empty if there is none.

        It is chat_template.jinja, or chat_template in tokenizer_config.json: text, or a list of
        named ones, of which `default` counts.
        """
        if TEMPLATE in self.texts:
            return self.texts[TEMPLATE]
        value = _value(self.folder, self.texts, TOKENIZER_CONFIG, "chat_template")
        if isinstance(value, list):
            named = {entry["name"]: entry["template"] for entry in value}
            if "default" not in named:
                raise ConfigError(
                    f"{self.folder / TOKENIZER_CONFIG} has the chat templates {', '.join(named)} "
                    "but none named default; set data.chat_template to a file with one of them"
                )
            value = named["default"]
        return value or ""


def _read_text(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; restore it, or remove it") from error


def _value(folder: Path, texts: Mapping[str, str], name: str, key: str) -> Any:
    return _object(folder, texts, name).get(key)


def _object(folder: Path, texts: Mapping[str, str], name: str) -> dict[str, Any]:
    if name not in texts:
        return {}
    try:
        values = json.loads(texts[name])
    except ValueError as error:
        raise ConfigError(f"{folder / name} is not JSON ({error}); restore it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{folder / name} must hold a JSON object; restore it")
    return values
