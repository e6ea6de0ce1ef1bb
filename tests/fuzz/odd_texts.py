"""Texts, one file or a folder of them: encodings, ends of lines, rare characters, documents."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from drafts import ROOT, Case, Draft, SkipOption, make_case, options_of
from judge import Anything, Texts
from layouts import LAYOUTS, NAMES, RUBBISH, SPELLINGS, Item, placed
from odd_codecs import ENCODINGS

WORDS = [
    "to",
    "be",
    "or",
    "not",
    "that",
    "is",
    "the",
    "question",
    "whether",
    "tis",
    "nobler",
    "in",
    "mind",
    "suffer",
    "slings",
    "and",
    "arrows",
    "of",
    "outrageous",
    "fortune",
    "take",
    "arms",
    "against",
    "sea",
    "troubles",
    "by",
    "opposing",
    "end",
    "them",
]
LINES = {"train": 40, "valid": 12, "test": 12}
SUFFIXES = (".txt", ".text", ".md", ".rst")


def _begin(rng: Random) -> Draft:
    draft = Draft("text", rng, Texts({}), settings={"vocab_size": 270, "seq_len": 16})
    draft.traits |= {"place": _place, "finish": placed, "unsplit": False}
    items = [
        Item(split, "", "", draft.rng.choice(SUFFIXES), _lines(rng, count))
        for split, count in LINES.items()
    ]
    draft.traits["items"] = items
    _note(draft)
    return draft


def _lines(rng: Random, count: int) -> bytes:
    return "".join(" ".join(rng.choices(WORDS, k=7)) + "\n" for _ in range(count)).encode()


def _note(draft: Draft) -> None:
    """What reading the items gives, as they are now: each is a document."""
    splits: dict[str, list[str]] = {}
    for item in draft.traits["items"]:
        splits.setdefault(item.split, []).append(item.content.decode())
    draft.clean = Texts(splits)


def _place(item: Item, spelled: str) -> str:
    return f"{spelled}{item.suffix}" if not item.stem else f"{spelled}-{item.stem}{item.suffix}"


def _inside(item: Item, spelled: str) -> str:
    return f"{spelled}/{item.stem or 'part'}{item.suffix}"


def _in_folders(draft: Draft) -> None:
    draft.traits["place"] = _inside
    _shards(draft)


def _shards(draft: Draft) -> None:
    """Several files of each split."""
    items = []
    for item in draft.traits["items"]:
        lines = item.content.splitlines(keepends=True)
        count = draft.rng.randint(2, 11) if item.split == "train" else 2
        for number in range(count):
            stem = (
                f"{number:05d}-of-{count:05d}" if draft.traits["place"] is _place else f"p{number}"
            )
            content = b"".join(lines[number::count])
            items.append(replace(item, stem=stem, suffix=".txt", content=content))
    draft.traits["items"] = items
    _note(draft)


def _one_file(suffix: str) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        content = b"".join(item.content for item in draft.traits["items"])
        draft.traits |= {"items": [Item("train", "", "", suffix, content)], "unsplit": True}
        draft.traits["place"] = lambda item, spelled: ""
        _note(draft)

    return apply


def _unsplit(draft: Draft) -> None:
    """Files that are called after no split."""
    items = draft.traits["items"]
    draft.traits["items"] = [
        replace(item, split="train", stem=f"book{n}") for n, item in enumerate(items)
    ]
    draft.traits |= {"unsplit": True, "place": lambda item, spelled: f"{item.stem}{item.suffix}"}
    _note(draft)


def _colliding(draft: Draft) -> None:
    """One file is called like a split, the others are not: read right, or refused."""
    _unsplit(draft)
    items = draft.traits["items"]
    split = draft.rng.choice(list(SPELLINGS))
    items[0] = replace(items[0], stem=draft.rng.choice(SPELLINGS[split]))
    draft.odd()


def _missing(draft: Draft) -> None:
    gone = draft.rng.choice((("valid",), ("test",), ("valid", "test"), ("train",)))
    items = draft.traits["items"]
    draft.traits["items"] = [item for item in items if item.split not in gone]
    draft.settings["held_out"] = 0.4
    _note(draft)
    if "train" in gone:
        draft.odd()


def _nameless(draft: Draft) -> None:
    """Files with a suffix that is not known, or with none."""
    suffix = draft.rng.choice(("", ".dat", ".en", ".raw", ".TXT", ".tex", ".log", ".utf8"))
    draft.traits["items"] = [replace(item, suffix=suffix) for item in draft.traits["items"]]


def _inserted(*texts: str, odd: bool = False) -> Callable[[Draft], None]:
    """Rare characters inside the lines, which are text as any other."""

    def apply(draft: Draft) -> None:
        text = draft.rng.choice(texts)
        changed = []
        for item in draft.traits["items"]:
            lines = item.content.decode().split("\n")
            for _ in range(3):
                place = draft.rng.randrange(len(lines) - 1)
                cut = draft.rng.randrange(len(lines[place]) + 1)
                lines[place] = lines[place][:cut] + text + lines[place][cut:]
            changed.append(replace(item, content="\n".join(lines).encode()))
        draft.traits["items"] = changed
        _note(draft)
        if odd:
            draft.odd()

    return apply


def _rewritten(change: Callable[[str], str]) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        items = draft.traits["items"]
        draft.traits["items"] = [
            replace(item, content=change(item.content.decode()).encode()) for item in items
        ]
        _note(draft)

    return apply


def _separated(draft: Draft) -> None:
    """Documents inside a file."""
    separator = draft.rng.choice(("<|endoftext|>", "\n\n", "---", "é", "aa"))
    draft.settings["document_separator"] = separator
    wanted: dict[str, list[str]] = {}
    items = []
    for item in draft.traits["items"]:
        text = item.content.decode().replace("aa", "a").replace("---", "-")
        lines = text.splitlines(keepends=True)
        documents = ["".join(lines[start : start + 5]) for start in range(0, len(lines), 5)]
        if draft.rng.random() < 0.5:
            documents.insert(1, "")
        content = separator.join(documents)
        items.append(replace(item, content=content.encode()))
        wanted.setdefault(item.split, []).extend(d for d in content.split(separator) if d)
    draft.traits["items"] = items
    draft.clean = Texts(wanted)


def _spelled_tokens(draft: Draft) -> None:
    draft.settings["document_separator"] = ""
    _inserted("<|endoftext|>", "<|pad|>", "<|endoftext|><|pad|>")(draft)


def _one_letter(draft: Draft) -> None:
    """Too little for a vocabulary of this size, perhaps."""
    _rewritten(lambda text: "ab" * (len(text) // 2))(draft)
    draft.odd()


CONTENT = {
    "one file": _one_file(".txt"),
    "one file of no suffix": _one_file(""),
    "one file of an odd suffix": _one_file(".dat"),
    "shards": _shards,
    "folders": _in_folders,
    "not split": _unsplit,
    "a file called like a split": _colliding,
    "splits are missing": _missing,
    "odd suffixes": _nameless,
    "upper-case suffixes": lambda draft: _one_file(".TXT")(draft),
    "accents": _inserted("é", "ñandú", "e\u0301", "ﬁ"),
    "scripts": _inserted("日本語", "Ελλάς", "שלום", "हिन्दी"),
    "emoji": _inserted("😀", "👩‍👩‍👧", "🏳️‍🌈"),
    "line separators": _inserted("\u2028", "\u2029", "\x85", "\x0b", "\x0c"),
    "spaces": _inserted("\u00a0", "\u3000", "\u200b", "\t", "   "),
    "controls": _inserted("\x01", "\x7f", "\x1b[0m", "\x08"),
    "marks in the text": _inserted("\ufeff", "\ufffe", "\ufffd", "\uffff"),
    "a NUL": _inserted("\0", odd=True),
    "rare planes": _inserted("\U0001f9ff", "\U000e0041", "\U0010ffff", "\ue000"),
    "right to left": _inserted("\u202e", "\u200f"),
    "quotes": _inserted("'", '"', "`", "\\", "${x}", "%s", "{}"),
    "separators": _separated,
    "special tokens as text": _spelled_tokens,
    "no end of line at the end": _rewritten(lambda text: text.rstrip("\n")),
    "empty lines": _rewritten(lambda text: "\n\n\n" + text.replace("\n", "\n\n") + "\n\n"),
    "one long line": _rewritten(lambda text: text.replace("\n", " ")),
    "one long word": _rewritten(lambda text: text.replace(" ", "").replace("\n", "")),
    "one letter": lambda draft: _one_letter(draft),
    "white space at the ends": _rewritten(lambda text: text.replace("\n", "  \n\t")),
}


def _small_blocks(draft: Draft) -> None:
    draft.patches |= {
        "block": draft.rng.choice((1, 2, 3, 7, 64)),
        "piece": draft.rng.choice((5, 64)),
    }


def _held_out(draft: Draft) -> None:
    draft.settings["held_out"] = draft.rng.choice((0.05, 0.1, 0.3, 0.5, 0.8))
    draft.odd()


def _setting(**settings: object) -> Callable[[Draft], None]:
    return lambda draft: draft.settings.update(settings)


SETTINGS = {
    "small blocks": _small_blocks,
    "another share": _held_out,
    "windows of one": _setting(seq_len=1),
    "long windows": _setting(seq_len=150),
    "the smallest vocabulary": _setting(vocab_size=258),
}


def damaged(
    change: Callable[[bytes, Random], bytes], unknowable: bool = False
) -> Callable[[Draft], None]:
    """Change one file, which may be refused; `unknowable`: or be what somebody wanted to write."""

    def apply(draft: Draft) -> None:
        name = draft.rng.choice(sorted(placed(draft)))
        draft.files[name] = change(draft.files[name], draft.rng)
        draft.odd()
        if unknowable:
            draft.clean = Anything()

    return apply


DAMAGES = {
    "a file is empty": damaged(lambda content, rng: b""),
    "only a mark": damaged(lambda content, rng: b"\xef\xbb\xbf", True),
    "only white space": damaged(lambda content, rng: b" \n\n \n", True),
    "a wrong byte": damaged(
        lambda content, rng: _put(
            content,
            rng,
            rng.choice(
                (
                    b"\xff",
                    b"\xc3",
                    b"\xed\xa0\x80",
                    b"\xc0\x80",
                    b"\xf4\x90\x80\x80",
                    b"\xe2\x82",
                    b"\x80",
                )
            ),
        )
    ),
    "cut in a character": damaged(lambda content, rng: content + "é".encode()[:1]),
    "NULs at the end": damaged(lambda content, rng: content + bytes(rng.randint(1, 600))),
    "another format": damaged(
        lambda content, rng: (
            rng.choice(
                (
                    b"PK\3\4",
                    b"\x1f\x8b\x08\0",
                    b"%PDF-1.7\n%\xe2\xe3",
                    b"\x89PNG\r\n\x1a\n",
                    b"\x93NUMPY",
                )
            )
            + content
        ),
        True,
    ),
}


def _put(content: bytes, rng: Random, wrong: bytes) -> bytes:
    place = rng.randrange(len(content) + 1)
    return content[:place] + wrong + content[place:]


def _documents(draft: Draft) -> None:
    """What tells of the data, beside them."""
    if ROOT in placed(draft):
        raise SkipOption
    name = draft.rng.choice(("README.md", "LICENSE.txt", "readme.rst", "CITATION.txt", "NOTICE"))
    draft.files[f"{ROOT}/{name}"] = b"About this text.\n"


OPTIONS = [
    *options_of("content", CONTENT),
    *options_of("encoding", ENCODINGS),
    *options_of("settings", SETTINGS),
    *NAMES,
    *options_of("damage", DAMAGES),
    *RUBBISH,
    *options_of("rubbish", {"documents": _documents}),
    *LAYOUTS,
]


def case(number: int, seed: int) -> Case:
    """Return a text."""
    return make_case("texts", _begin, OPTIONS, number, seed)
