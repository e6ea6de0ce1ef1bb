"""Odd inputs as data: what is written, what the clean input gives, and how both are combined."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

from trainer.config.train import DataConfig

ROOT = "data"  # the folder of data.path, inside the folder of a case


@dataclass
class Draft:
    """Files of one case, under names relative to its folder, and what reading them must give."""

    kind: str  # data.kind
    rng: Random
    clean: Any  # an Images, Texts or Pairs: what the clean input gives
    files: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)  # link: what it leads to
    folders: set[str] = field(default_factory=set)
    pipes: set[str] = field(default_factory=set)  # neither files nor folders
    path: str = ROOT
    settings: dict[str, Any] = field(default_factory=dict)  # of DataConfig
    patches: dict[str, int] = field(default_factory=dict)  # constants of the readers
    may_differ: bool = False  # a difference is right where a word is said
    readable: bool = True  # false: it may be refused
    traits: dict[str, Any] = field(default_factory=dict)  # what options of a kind tell each other

    def odd(self) -> None:
        """Let the case be refused, or be read otherwise if that is said."""
        self.may_differ, self.readable = True, False

    def write(self, folder: Path) -> DataConfig:
        """Write all of it into an empty folder."""
        for name in self.folders:
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for name, target in self.links.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(folder / target)
        for name in self.pipes:
            os.mkfifo(folder / name)
        settings = {"seq_len": 64, "vocab_size": 300, "cache": str(folder / "cache")}
        settings |= self.settings
        if name := settings.get("tokenizer"):
            settings["tokenizer"] = str(folder / name)
        return DataConfig(kind=self.kind, path=f"{folder}/{self.path}", **settings)

    def digest(self) -> bytes:
        """Tell inputs apart."""
        text = repr(
            (
                self.kind,
                sorted(self.files.items()),
                sorted(self.links.items()),
                self.path,
                sorted(self.folders),
                sorted(self.pipes),
                sorted(self.settings.items()),
                sorted(self.patches.items()),
            )
        )
        return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()

    def moved(self, rename: Callable[[str], str]) -> None:
        """Give everything that is below data.path another name."""
        inside = f"{ROOT}/"
        self.files = {rename(n) if n.startswith(inside) else n: c for n, c in self.files.items()}
        self.links = {rename(n) if n.startswith(inside) else n: t for n, t in self.links.items()}


class SkipOption(Exception):  # noqa: N818
    """An option that has no meaning for this draft."""


@dataclass(frozen=True)
class Option:
    """One oddity; options of one layer exclude each other."""

    layer: str
    name: str
    apply: Callable[[Draft], None]


@dataclass(frozen=True)
class Case:
    """One input of the fuzzer."""

    kind: str
    name: str
    draft: Draft


def options_of(layer: str, table: dict[str, Callable[[Draft], None]]) -> list[Option]:
    """Return a table of functions as the options of one layer."""
    return [Option(layer, name, apply) for name, apply in table.items()]


def make_case(
    kind: str,
    begin: Callable[[Random], Draft],
    options: list[Option],
    number: int,
    seed: int,
    written: Callable[[Draft], None] = lambda draft: None,
) -> Case:
    """Return the case of this number: each option alone, then two or three of different layers.

    `written` writes the content down once that is decided, before files get names.
    """
    rng = Random(f"{seed}/{kind}/{number}")
    draft = begin(rng)
    if number < len(options):
        chosen = [options[number]]
    else:
        chosen, layers = [], set()
        for option in rng.sample(options, len(options)):
            if option.layer == "damage" and rng.random() < 0.7:
                continue  # it hides what the others do
            if option.layer not in layers and len(chosen) < rng.choice((2, 2, 3)):
                chosen.append(option)
                layers.add(option.layer)
    chosen.sort(key=lambda option: ORDER.index(option.layer))
    applied, pending = [], True
    for option in chosen:
        if pending and ORDER.index(option.layer) >= ORDER.index("names"):
            pending = written(draft) is not None
        try:
            option.apply(draft)
        except SkipOption:
            continue
        applied.append(option.name)
    if pending:
        written(draft)
    if finish := draft.traits.get("finish"):  # where no option has asked for the files
        finish(draft)
    return Case(kind, f"{kind}:{number} {' + '.join(applied) or 'plain'}", draft)


# What an input is made of, in the order in which that is decided.
ORDER = (
    "content",
    "shape",
    "tokenizer",
    "encoding",
    "settings",
    "names",
    "damage",
    "rubbish",
    "layout",
)


def emptied(folder: Path) -> Path:
    """Return the folder, there and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
