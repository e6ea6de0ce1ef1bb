"""Tables of pairs (TSV) with every oddity that a line, a cell or a file can have."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from drafts import Case, Draft, make_case, options_of
from judge import Pairs
from layouts import LAYOUTS, NAMES, RUBBISH, Item, placed
from odd_codecs import ASIAN
from odd_texts import damaged

Pair = tuple[str, str]
ROWS = {"train": 30, "valid": 6, "test": 6}
WORDS = [
    "licht",
    "küche",
    "wohnzimmer",
    "heizung",
    "fenster",
    "tür",
    "an",
    "aus",
    "auf",
    "zu",
    "lamp",
    "kitchen",
    "window",
    "door",
]


def _begin(rng: Random) -> Draft:
    draft = Draft("pairs", rng, Pairs({}), settings={"vocab_size": 270})
    draft.traits |= {
        "place": _place,
        "finish": _finish,
        "end": "\n",
        "last": "\n",
        "codec": "utf-8",
    }
    rows = {
        split: [(_words(rng), _words(rng)) for _ in range(count)] for split, count in ROWS.items()
    }
    draft.traits |= {"rows": rows, "suffix": ".tsv", "unsplit": False, "before": "", "after": ""}
    draft.traits["items"] = [Item(split, "", "", ".tsv", b"") for split in rows]
    return draft


def _words(rng: Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))


def _place(item: Item, spelled: str) -> str:
    return f"{spelled}-{item.stem}{item.suffix}" if item.stem else f"{spelled}{item.suffix}"


def _finish(draft: Draft) -> None:
    placed(draft)


def _rows(draft: Draft) -> None:
    """Write the rows down; the last of the options that change rows, before files are placed."""
    traits = draft.traits
    items = []
    if traits.get("single"):  # what stands around a file stands once
        traits |= {"before": "", "after": "", "last": traits["last"] or traits["end"]}
    if traits["codec"] in ASIAN:
        for rows in [*traits["rows"].values(), *draft.clean.splits.values()]:
            rows[:] = [tuple(cell.replace("ü", "日") for cell in row) for row in rows]
    for item in traits["items"]:
        lines = ["\t".join(row) for row in traits["rows"][item.split]]
        text = traits["before"] + traits["end"].join(lines) + traits["last"] + traits["after"]
        items.append(replace(item, content=text.encode(traits["codec"], "replace")))
    traits["items"] = items
    if not draft.clean.splits:
        draft.clean.splits.update(
            {
                split: [(row[0].strip(), row[1].strip()) for row in rows if len(row) > 1]
                for split, rows in traits["rows"].items()
            }
        )
    if traits.get("single"):
        traits["items"] = [replace(items[0], content=b"".join(item.content for item in items))]
        traits["place"] = lambda item, spelled: ""
        draft.clean = Pairs(
            {"train": [row for rows in draft.clean.splits.values() for row in rows]}
        )
        traits["unsplit"] = True


def _inserted(*texts: str, odd: bool = False) -> Callable[[Draft], None]:
    """Rare characters inside cells."""

    def apply(draft: Draft) -> None:
        for rows in draft.traits["rows"].values():
            for place in draft.rng.sample(range(len(rows)), 2):
                side, text = draft.rng.randrange(2), draft.rng.choice(texts)
                cells = list(rows[place])
                cut = draft.rng.randrange(len(cells[side]) + 1)
                cells[side] = cells[side][:cut] + text + cells[side][cut:]
                rows[place] = tuple(cells)
        if odd:
            draft.odd()

    return apply


def _odd_row(change: Callable[[Pair, Random], tuple[str, ...]]) -> Callable[[Draft], None]:
    """One row of one file is no pair: refused, or left out with a word."""

    def apply(draft: Draft) -> None:
        split = draft.rng.choice(list(ROWS))
        clean = {s: list(rows) for s, rows in draft.traits["rows"].items()}
        rows = draft.traits["rows"][split]
        place = draft.rng.randrange(len(rows))
        rows[place] = change(rows[place], draft.rng)
        draft.clean = Pairs(clean)
        draft.odd()

    return apply


def _trait(odd: bool = False, **traits: object) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        draft.traits.update(traits)
        if odd:
            draft.odd()

    return apply


def _header(draft: Draft) -> None:
    """A first line that names the columns is no pair."""
    names = draft.rng.choice(
        (
            ("source", "target"),
            ("en", "de"),
            ("src", "tgt"),
            ("English", "German"),
            ("input", "output"),
            ("sentence_en", "sentence_de"),
        )
    )
    clean = {split: list(rows) for split, rows in draft.traits["rows"].items()}
    for rows in draft.traits["rows"].values():
        rows.insert(0, names)
    draft.clean = Pairs(clean)
    draft.odd()


def _twice(draft: Draft) -> None:
    rows = draft.traits["rows"]["train"]
    rows += rows[:3]


def _padded(draft: Draft) -> None:
    """White space around cells is no part of them."""
    space = draft.rng.choice((" ", "  ", "\u00a0", "\u3000"))
    for rows in draft.traits["rows"].values():
        rows[:] = [(f"{space}{a} ", f"{b}{space}") for a, b in rows]


def _long(split: str) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        rows = draft.traits["rows"][split]
        rows[2] = (rows[2][0], "lampe " * 200)
        draft.may_differ = True

    return apply


def _missing(draft: Draft) -> None:
    gone = draft.rng.choice((("valid",), ("test",), ("valid", "test"), ("train",)))
    draft.traits["items"] = [item for item in draft.traits["items"] if item.split not in gone]
    draft.traits["rows"] = {s: rows for s, rows in draft.traits["rows"].items() if s not in gone}
    draft.clean = Pairs({})
    draft.settings["held_out"] = 0.4
    if "train" in gone:
        draft.odd()


def _quoted(draft: Draft) -> None:
    for rows in draft.traits["rows"].values():
        rows[:] = [(f'"{a}"', f'"{b}"') for a, b in rows]


CONTENT = {
    "accents": _inserted("é", "e\u0301"),
    "scripts": _inserted("日本語", "שלום"),
    "emoji": _inserted("😀", "👩‍👩‍👧"),
    "line separators": _inserted("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"),
    "a carriage return": _inserted("\r", odd=True),
    "spaces": _inserted("\u00a0", "\u3000", "  ", "\u200b"),
    "controls": _inserted("\x01", "\x7f", "\x1b[0m"),
    "a NUL": _inserted("\0", odd=True),
    "marks": _inserted("\ufffd", "\ufffe"),
    "quotes": _inserted('"', "'", '""', "`", "\\", "\\t", "\\n"),
    "special tokens as text": _inserted("<|endoftext|>", "<|pad|>"),
    "commas": _inserted(",", ";", "|"),
    "null words": _inserted("NULL", "None", "nan", "NA", "N/A"),
    "numbers": _inserted("1e5", "007"),
    "three cells": _odd_row(lambda row, rng: (*row, rng.choice(("", "x", "0.9")))),
    "one cell": _odd_row(lambda row, rng: row[:1]),
    "an empty side": _odd_row(lambda row, rng: (row[0], "")),
    "an empty source": _odd_row(lambda row, rng: ("", row[1])),
    "an empty row": _odd_row(lambda row, rng: ("",)),
    "a blank side": _odd_row(lambda row, rng: (row[0], rng.choice((" ", "\u00a0", "\u3000")))),
    "only tabs": _odd_row(lambda row, rng: ("", "", "")),
    "a comment": _odd_row(lambda row, rng: ("# a comment",)),
    "commas for tabs": _odd_row(lambda row, rng: (",".join(row),)),
    "spaces for tabs": _odd_row(lambda row, rng: ("    ".join(row),)),
    "a header": _header,
    "rows twice": _twice,
    "padded cells": _padded,
    "quoted cells": _quoted,
    "a long pair of train": _long("train"),
    "a long pair of test": _long("test"),
    "splits are missing": _missing,
    "one file": _trait(single=True),
}
ENCODINGS = {
    "CRLF": _trait(end="\r\n", last="\r\n"),
    "CR": _trait(True, end="\r", last="\r"),
    "no end of line at the end": _trait(last=""),
    "an empty line at the end": _trait(last="\n\n", odd=True),
    "blanks at the end": _trait(last="\n  \n", odd=True),
    "CRLF, none at the end": _trait(end="\r\n", last=""),
    "a mark": _trait(before="\ufeff"),
    "a mark and CRLF": _trait(before="\ufeff", end="\r\n", last="\r\n"),
    "an empty line before": _trait(before="\n", odd=True),
    "Ctrl-Z at the end": _trait(after="\x1a", odd=True),
    **{
        codec: _trait(True, codec=codec)
        for codec in (
            "utf-16",
            "utf-16-le",
            "utf-16-be",
            "utf-32",
            "latin1",
            "cp1252",
            "cp850",
            *ASIAN[:5],
        )
    },
    "LF CR": _trait(True, end="\n\r"),
}


def _suffix(suffix: str) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        draft.traits["items"] = [replace(i, suffix=suffix) for i in draft.traits["items"]]
        if suffix not in (".txt", ".TSV"):
            draft.odd()

    return apply


def _small_blocks(draft: Draft) -> None:
    draft.patches["block"] = draft.rng.choice((1, 2, 3, 7, 64))


SETTINGS = {
    "small blocks": _small_blocks,
    "another share": lambda draft: draft.settings.update(held_out=0.3),
    **{f"as {suffix}": _suffix(suffix) for suffix in (".txt", ".TSV", ".csv", ".tab", "", ".json")},
}
DAMAGES = {
    "a file is empty": damaged(lambda content, rng: b""),
    "only white space": damaged(lambda content, rng: b"\n \n\t\n", True),
    "a wrong byte": damaged(lambda content, rng: content[:9] + b"\xff" + content[9:]),
    "cut": damaged(lambda content, rng: content[: rng.randrange(len(content))], True),
    "NULs at the end": damaged(lambda content, rng: content + bytes(40)),
    "another format": damaged(
        lambda content, rng: rng.choice((b"PK\3\4", b"\x1f\x8b", b"{}")) + content, True
    ),
}
OPTIONS = [
    *options_of("content", CONTENT),
    *options_of("encoding", ENCODINGS),
    *options_of("settings", SETTINGS),
    *NAMES,
    *options_of("damage", DAMAGES),
    *RUBBISH,
    *LAYOUTS,
]


def case(number: int, seed: int) -> Case:
    """Return a table of pairs."""
    return make_case("pairs", _begin, OPTIONS, number, seed, _rows)
