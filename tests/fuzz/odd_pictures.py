"""Folders of class folders with pictures, odd in their files, names or places."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath
from random import Random

import numpy as np
from drafts import Case, Draft, SkipOption, make_case, options_of
from judge import Anything, Images
from layouts import LAYOUTS, NAMES, ODD_NAMES, RUBBISH, Item, placed
from odd_encodings import WAYS, Way, drawn
from raw_pictures import SIZE, png

CLASSES = ("ant", "bee", "cat")
COUNTS = {"train": 2, "valid": 1, "test": 1}  # pictures of each class


def _begin(rng: Random) -> Draft:
    draft = Draft("images", rng, Images({}))
    draft.traits |= {"place": _place, "finish": placed, "unsplit": False}
    _content(draft, CLASSES, "colour" if rng.random() < 0.5 else "grey")
    return draft


def _content(draft: Draft, classes: tuple[str, ...], kind: str) -> None:
    plain = next(way for way in WAYS["plain"] if way.draw == kind)
    items, unsplit = [], draft.traits["unsplit"]
    draft.clean = Images({"train": []} if unsplit else {split: [] for split in COUNTS})
    draft.traits["pixels"] = {}
    for split, count in COUNTS.items():
        for label in classes:
            for number in range(5 * count if unsplit and split == "train" else count):
                items.append(
                    Item("train" if unsplit else split, label, f"{number}{split}", "", b"")
                )
    draft.traits["items"] = items
    for place in range(len(items)):
        _encode(draft, place, plain)


def _encode(draft: Draft, place: int, way: Way) -> None:
    """Write one picture another way, and note what is seen then."""
    items = draft.traits["items"]
    encoded = way.save(drawn(way.draw, place, draft.rng), draft.rng)
    pixels = encoded.pixels
    pixels = pixels if pixels.ndim == 3 else np.stack([pixels] * 3, 2)
    items[place] = replace(items[place], suffix=encoded.suffix, content=encoded.content)
    draft.traits["pixels"][place] = pixels
    draft.clean.tolerance.append(encoded.tolerance)
    if encoded.refused:
        draft.odd()
    _note(draft)


def _note(draft: Draft) -> None:
    """What reading the items gives, as they are now."""
    for pictures in draft.clean.splits.values():
        pictures.clear()
    for place, pixels in draft.traits["pixels"].items():
        item = draft.traits["items"][place]
        draft.clean.splits[item.split].append((item.label, pixels))


def _place(item: Item, spelled: str) -> str:
    return f"{spelled}/{item.label}/{item.stem}{item.suffix}"


def _place_unsplit(item: Item, spelled: str) -> str:
    return f"{item.label}/{item.stem}{item.suffix}"


def _unsplit(draft: Draft) -> None:
    draft.traits |= {"unsplit": True, "place": _place_unsplit}
    _content(draft, CLASSES, draft.rng.choice(("grey", "colour")))


def _split(draft: Draft) -> None:
    draft.traits["unsplit"] = False
    _content(draft, CLASSES, draft.rng.choice(("grey", "colour")))


def _classes(*names: str, odd: bool = False) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        chosen = names or tuple(draft.rng.sample(ODD_NAMES, 3))
        _content(draft, tuple(chosen), draft.rng.choice(("grey", "colour")))
        if odd:
            draft.odd()

    return apply


def _colliding(draft: Draft) -> None:
    """A class that is called like a split: read right, or refused."""
    names = draft.rng.choice(
        (
            ("bus", "car", "train"),
            ("exam", "test", "quiz"),
            ("dev", "ops", "sales"),
            ("val", "kim"),
            ("Train", "Test", "Bus"),
            ("eval", "exec", "open"),
            ("training", "running"),
        )
    )
    _classes(*names, odd=True)(draft)


def _encoded(table: str, all_of_them: bool) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        if draft.traits.get("places"):
            raise SkipOption
        count = len(draft.traits["items"])
        chosen = range(count) if all_of_them else draft.rng.sample(range(count), 1)
        way = draft.rng.choice(WAYS[table])
        for place in chosen:
            _encode(draft, place, way)

    return apply


def _mixed(draft: Draft) -> None:
    """Each file another way."""
    for place in range(len(draft.traits["items"])):
        table = draft.rng.choice([name for name in WAYS if not name.startswith("formats")])
        _encode(draft, place, draft.rng.choice(WAYS[table]))


def _damaged(change: Callable[[bytes, Random], bytes], skip: bool) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        name = draft.rng.choice(sorted(placed(draft)))
        before = draft.files[name]
        draft.files[name] = change(before, draft.rng)
        draft.odd()
        if skip:
            draft.settings["on_bad_file"] = "skip"
        checked = before.startswith(b"\x89PNG")  # the other formats have no check sums
        if change in (_flipped, _zeroed) and not checked:
            draft.clean = Anything()

    return apply


def _cut(content: bytes, rng: Random) -> bytes:
    return content[: int(len(content) * rng.random())]


def _clipped(content: bytes, rng: Random) -> bytes:
    return content[: -rng.randint(1, 30)]


def _flipped(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= rng.randint(1, 255)
    return bytes(changed)


def _zeroed(content: bytes, rng: Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + bytes(len(content) - start)


def _foreign(content: bytes, rng: Random) -> bytes:
    return rng.choice(
        (
            b"",
            b"\0",
            b"<html>404</html>",
            b"GIF89a",
            b"\x89PNG\r\n\x1a\n",
            b"BM",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            b"P5\n8 8\n255\n",
            b"P5\n0 0\n255\n",
            b"II*\0",
            b"\xff\xd8\xff",
            b"RIFF",
            b"P2\n8 8\n255\nx y z",
            b"P6 99999999999 9 255 ",
        )
    )


def _sized(width: int, height: int) -> Callable[[bytes, Random], bytes]:
    def change(content: bytes, rng: Random) -> bytes:
        samples = np.zeros((min(height, 64), max(1, min(width, 64)), 1), int)
        made = png(samples, 8, 0)
        head = made[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + made[24:29]
        return head + zlib_crc(head[12:29]) + made[33:]

    return change


def zlib_crc(chunk: bytes) -> bytes:
    """Return the check sum of a PNG chunk, name and data."""
    return zlib.crc32(chunk).to_bytes(4, "big")


def _appended(content: bytes, rng: Random) -> bytes:
    return content + rng.choice((b"\0", b"more", content))


DAMAGES = {
    "cut": _cut,
    "clipped": _clipped,
    "flipped": _flipped,
    "zeroed": _zeroed,
    "foreign": _foreign,
    "another size": _sized(SIZE * 2, SIZE * 2),
    "no width": _sized(0, SIZE),
    "a bomb": _sized(30_000, 30_000),
    "half a bomb": _sized(12_000, 10_000),
}


def _beside(draft: Draft) -> None:
    """Pictures outside of the class folders are left out, and that is said."""
    name = draft.rng.choice(sorted(placed(draft)))
    parents = [str(p) for p in PurePosixPath(name).parents][1:-1]
    draft.files[f"{draft.rng.choice(parents)}/stray{PurePosixPath(name).suffix}"] = draft.files[
        name
    ]
    draft.odd()


def _nested(draft: Draft) -> None:
    name = draft.rng.choice(sorted(placed(draft)))
    path = PurePosixPath(name)
    draft.files[f"{path.parent}/more/{path.name}"] = draft.files.pop(name)
    draft.odd()


def _other_class(draft: Draft) -> None:
    if draft.traits["unsplit"]:
        raise SkipOption
    items = draft.traits["items"]
    place = next(i for i, item in enumerate(items) if item.split != "train")
    label = draft.rng.choice(("dog", items[place].label.upper(), items[place].label + " ", "Ant"))
    items[place] = replace(items[place], label=label)
    _note(draft)
    draft.odd()


def _missing_split(draft: Draft) -> None:
    if draft.traits["unsplit"]:
        raise SkipOption
    gone = draft.rng.choice(
        (("valid",), ("test",), ("valid", "test"), ("train",), ("train", "test"))
    )
    items, pixels = draft.traits["items"], draft.traits["pixels"]
    kept = [place for place, item in enumerate(items) if item.split not in gone]
    draft.traits["items"] = [items[place] for place in kept]
    draft.traits["pixels"] = {new: pixels[old] for new, old in enumerate(kept)}
    draft.clean = Images(
        {split: [] for split in COUNTS if split not in gone} or {"train": []}, draft.clean.tolerance
    )
    draft.settings["held_out"] = 0.5
    _note(draft)
    if "train" in gone:
        draft.odd()


def _sharded(draft: Draft) -> None:
    """Several folders of one split."""
    if draft.traits["unsplit"]:
        raise SkipOption

    def place(item: Item, spelled: str) -> str:
        return f"{spelled}_{1 + (item.stem[0] == '0')}/{item.label}/{item.stem}{item.suffix}"

    draft.traits["place"] = place


def _clashing(draft: Draft) -> None:
    """Files of one name in several formats."""
    items = draft.traits["items"]
    draft.traits["items"] = [replace(i, stem=f"{i.split[0]}{n}.x") for n, i in enumerate(items)]


OPTIONS = [
    *options_of(
        "content",
        {
            "not split": _unsplit,
            "split": _split,
            "odd class names": _classes(),
            "a class called like a split": _colliding,
            "one class": _classes("one"),
            "numbered classes": _classes("0", "1", "10"),
            "two classes": _classes("Cat", "cat"),
        },
    ),
    *options_of(
        "encoding",
        {
            f"{name}, {'all' if every else 'one'}": _encoded(name, every)
            for name in WAYS
            for every in (False, True)
        }
        | {"every way": _mixed},
    ),
    *options_of(
        "settings",
        {
            "a class of one split": _other_class,
            "splits are missing": _missing_split,
            "split folders with numbers": _sharded,
            "dots in names": _clashing,
        },
    ),
    *NAMES,
    *options_of(
        "damage",
        {
            f"{name}{', skipped' if skip else ''}": _damaged(change, skip)
            for name, change in DAMAGES.items()
            for skip in (False, True)
        }
        | {
            "more at the end": lambda draft: _damaged(_appended, False)(draft),
            "beside": _beside,
            "nested": _nested,
        },
    ),
    *RUBBISH,
    *LAYOUTS,
]


def case(number: int, seed: int) -> Case:
    """Return a folder of pictures."""
    return make_case("pictures", _begin, OPTIONS, number, seed)
