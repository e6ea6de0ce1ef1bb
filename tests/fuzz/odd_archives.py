"""Archives (.npz) of labelled pictures: odd keys, dtypes, layouts, labels and bytes."""

from collections.abc import Callable
from io import BytesIO
from random import Random
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import numpy as np
from drafts import ROOT, Case, Draft, SkipOption, make_case, options_of
from judge import Anything, Images
from layouts import LAYOUTS
from odd_encodings import drawn
from odd_keys import NAMES, PER_CLASS
from odd_zips import OTHERS, flipped
from raw_pictures import SIZE

CLASSES = ("ant", "bee", "cat")
Change = Callable[[np.ndarray, Random], np.ndarray]


def _begin(rng: Random) -> Draft:
    draft = Draft("images", rng, Images({}), path=f"{ROOT}.npz")
    draft.traits |= {"finish": _finish, "key": "{role}_{split}"}
    _content(draft, rng.choice(("grey", "colour")))
    return draft


def _content(draft: Draft, kind: str) -> None:
    arrays: dict[str, Any] = {"classes": np.array(CLASSES)}
    draft.clean = Images({}, [1])
    number = 0
    for split, count in PER_CLASS.items():
        labels = [label for label in range(len(CLASSES)) for _ in range(count)]
        draft.rng.shuffle(labels)
        pixels = np.stack([drawn(kind, number + i, draft.rng) for i in range(len(labels))])
        number += len(labels)
        arrays |= {f"x {split}": pixels, f"y {split}": np.array(labels)}
    draft.traits |= {"arrays": arrays, "named": True}
    _note(draft)


def _note(draft: Draft) -> None:
    """What reading the arrays gives, as they are now: whole numbers are labels of CLASSES."""
    for split in PER_CLASS:
        pixels, labels = (draft.traits["arrays"][f"{role} {split}"] for role in "xy")
        seen = pixels if pixels.ndim == 4 else np.stack([pixels] * 3, 3)
        draft.clean.splits[split] = [
            (CLASSES[label], picture) for label, picture in zip(labels, seen, strict=True)
        ]


def _of_kind(kind: str) -> Callable[[Draft], None]:
    return lambda draft: _content(draft, kind)


def _finish(draft: Draft) -> None:
    if "arrays" not in draft.traits:
        return
    arrays, spelled = draft.traits.pop("arrays"), draft.traits.get("spelled", {})
    named = {}
    for key, array in arrays.items():
        role, _, split = key.partition(" ")
        if split and (role, split) not in draft.traits.get("renamed", {}):
            template = draft.traits["key"]
            key = template.format(role=role, split=spelled.get(split, split))
        else:
            key = draft.traits.get("renamed", {}).get((role, split), key)
        named[key] = array
    order = list(named)
    draft.rng.shuffle(order)
    file = BytesIO()
    with ZipFile(file, "w", draft.rng.choice((ZIP_STORED, ZIP_DEFLATED))) as archive:
        for key in order:  # as np.savez, which writes the time of day as well
            member = BytesIO()
            np.save(member, named[key])
            info = ZipInfo(f"{key}.npy")
            info.compress_type = archive.compression
            archive.writestr(info, member.getvalue())
    draft.files[f"{ROOT}.npz"] = file.getvalue()


def _sized(dtype: str, factor: float, odd: bool = False) -> Callable[[Draft], None]:
    """Pixels from 0 to 255 become another range."""
    return _unless_binary(_changed("x", _as(dtype, factor), odd))


def _unless_binary(change: Callable[[Draft], None]) -> Callable[[Draft], None]:
    """A change that is not made to zeros and ones, whose range it would leave as it is."""

    def apply(draft: Draft) -> None:
        if draft.traits.get("binary"):
            raise SkipOption
        change(draft)

    return apply


def _changed(role: str, change: Change, odd: bool, splits: Any = None) -> Callable[[Draft], None]:
    """Change the pixels (x) or labels (y); `odd`: it may be refused."""

    def apply(draft: Draft) -> None:
        for split in splits or PER_CLASS:
            key = f"{role} {split}"
            try:
                draft.traits["arrays"][key] = change(draft.traits["arrays"][key], draft.rng)
            except (ValueError, TypeError, IndexError):  # what was changed before does not take it
                raise SkipOption from None
        if odd:
            draft.odd()

    return apply


def _on_white(draft: Draft) -> None:
    """With alpha, of which what is clear is white."""
    for split in PER_CLASS:
        x = draft.traits["arrays"][f"x {split}"]
        if x.ndim != 4 or x.dtype != np.uint8:
            raise SkipOption
        alpha = np.full(x.shape[:3], 255, np.uint8)
        alpha[:, : draft.rng.randint(1, 7)] = 0
        draft.traits["arrays"][f"x {split}"] = np.where(alpha[..., None] > 0, x, 255)
    _note(draft)
    for split in PER_CLASS:
        x = draft.traits["arrays"][f"x {split}"]
        alpha = np.where((x == 255).all(3), 0, 255).astype(np.uint8)
        x = np.where(alpha[..., None] > 0, x, 9)
        draft.traits["arrays"][f"x {split}"] = np.concatenate([x, alpha[..., None]], 3)


def _channels(first: bool, one: bool = False) -> Change:
    def change(x: np.ndarray, rng: Random) -> np.ndarray:
        if one:
            if x.ndim == 4:
                raise SkipOption
            x = x[..., None]
        if x.ndim != 4:
            raise SkipOption
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if first else x

    return change


def _as(dtype: str, factor: float = 1.0, shift: float = 0.0) -> Change:
    return lambda x, rng: (x.astype(np.float64) * factor + shift).astype(dtype)


def _with(value: float) -> Change:
    """One pixel or label becomes this."""

    def change(x: np.ndarray, rng: Random) -> np.ndarray:
        x = (
            x.astype(np.float64 if value != int(value if value == value else 0) else np.int64)
            if np.isfinite(value)
            else x.astype(np.float64)
        )
        x.reshape(-1)[rng.randrange(x.size)] = value
        return x

    return change


def _binary(dtype: str) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        _content(draft, "two")
        for split in PER_CLASS:
            key = f"x {split}"
            draft.traits["arrays"][key] = (draft.traits["arrays"][key] > 0).astype(dtype)
        draft.traits["binary"] = True
        if dtype not in ("bool", "float32"):  # numbers up to 255, or no more than 1?
            draft.odd()

    return apply


PIXELS = {
    "grey": _of_kind("grey"),
    "colour": _of_kind("colour"),
    "black and white": _of_kind("two"),
    "binary bool": _binary("bool"),
    "binary uint8": _binary("uint8"),
    "binary int64": _binary("int64"),
    "binary float32": _binary("float32"),
    "binary uint16": _binary("uint16"),
}
DTYPES = {
    "int64": _changed("x", _as("int64"), False),
    "int16": _changed("x", _as("int16"), False),
    "big-endian uint16": _sized(">u2", 257, False),
    "uint16 of 8 bits": _changed("x", _as("uint16"), True),
    "uint16 of 12 bits": _sized("uint16", 16, True),
    "uint32": _changed("x", _as("uint32"), False),
    "uint64": _changed("x", _as("uint64"), False),
    "uint32 of 16 bits": _sized("uint32", 257, True),
    "float32 shares": _sized("float32", 1 / 255, False),
    "float64 shares": _sized("float64", 1 / 255, False),
    "float16 shares": _sized("float16", 1 / 255, False),
    "big-endian float": _sized(">f4", 1 / 255, False),
    "float32 to 255": _changed("x", _as("float32"), False),
    "float32 from -1 to 1": _changed("x", _as("float32", 2 / 255, -1), True),
    "standardised": _changed("x", _as("float32", 1 / 60, -2), True),
    "fractions to 255": _changed("x", _as("float32", 1, 0.25), True),
    "longdouble": _sized("longdouble", 1 / 255, True),
    "complex": _changed("x", lambda x, rng: x.astype(complex), True),
    "percent": _sized("float32", 100 / 255, True),
    "int8": _changed("x", lambda x, rng: x.astype(np.int8), True),
    "objects": _changed("x", lambda x, rng: x.astype(object), True),
    "words for pixels": _changed("x", lambda x, rng: x.astype(str), True),
    "a date": _changed("x", lambda x, rng: x.astype("datetime64[s]"), True),
    "records": _changed("x", lambda x, rng: x.astype([("r", "u1"), ("g", "u1")]), True),
    **{
        f"a pixel of {value}": _unless_binary(_changed("x", _with(value), True))
        for value in (-1, 256, 1e9, 0.5, float("nan"), float("inf"), -float("inf"))
    },
    "valid in another range": _changed("x", _as("float32", 1 / 255), True, ("valid",)),
    "valid in another dtype": _changed("x", _as("int64"), True, ("valid",)),
    "test in 16 bits": _changed("x", _as("uint16", 257), True, ("test",)),
}
SHAPES = {
    "channels first": _changed("x", _channels(True), False),
    "one channel last": _changed("x", _channels(False, True), False),
    "one channel first": _changed("x", _channels(True, True), False),
    "alpha": _on_white,
    "flat": _changed("x", lambda x, rng: x.reshape(len(x), -1), True),
    "two channels": _changed("x", lambda x, rng: np.stack([x, x], -1), True),
    "not square": _changed("x", lambda x, rng: x[:, :-1], True),
    "valid of another size": _changed("x", lambda x, rng: x[:, :-1, :-1], True, ("valid",)),
    "no pictures": _changed("x", lambda x, rng: x[:0], True),
    "no pixels": _changed("x", lambda x, rng: x[:, :0], True),
    "one dimension more": _changed("x", lambda x, rng: x[:, None, None], True),
    "a number": _changed("x", lambda x, rng: np.array(7), True),
    "in Fortran's order": _changed("x", lambda x, rng: np.asfortranarray(x), False),
    "fewer pictures": _changed("x", lambda x, rng: x[:-1], True),
    "valid in grey": _changed(
        "x", lambda x, rng: x.reshape(len(x), SIZE, SIZE, -1)[..., 0], True, ("valid",)
    ),
}


def _words(code: str) -> Change:
    return lambda y, rng: np.array(CLASSES)[y].astype(code)


def _unnamed(draft: Draft) -> None:
    """Without `classes` the labels are the names."""
    draft.traits["arrays"].pop("classes", None)
    for split, rows in draft.clean.splits.items():
        draft.clean.splits[split] = [(str(CLASSES.index(name)), x) for name, x in rows]


def _named_by_words(code: str) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        draft.traits["arrays"].pop("classes")
        _changed("y", _words(code), False)(draft)

    return apply


def _class_names(make: Callable[[Random], Any], odd: bool) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        names = draft.traits["arrays"]["classes"] = make(draft.rng)
        if odd:
            draft.odd()
        else:
            renamed = dict(zip(CLASSES, [_text(n) for n in names.ravel()], strict=False))
            for split, rows in draft.clean.splits.items():
                draft.clean.splits[split] = [(renamed[name], x) for name, x in rows]

    return apply


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _shifted(draft: Draft) -> None:
    """Labels from 1 on, or with holes: classes without pictures are no mistake."""
    spread = draft.rng.choice(((1, 2, 3), (0, 4, 7), (5, 6, 7)))
    _unnamed(draft)
    for split, rows in draft.clean.splits.items():
        draft.clean.splits[split] = [(str(spread[int(name)]), x) for name, x in rows]
    _changed("y", lambda y, rng: np.array(spread)[y], False)(draft)


LABELS = {
    **{
        code: _changed("y", _as(code), False)
        for code in ("int8", "uint8", ">i4", "uint64", "float32", "float64")
    },
    "one column": _changed("y", lambda y, rng: y[:, None], False),
    "one hot": _changed("y", lambda y, rng: np.eye(3)[y], True),
    "one row": _changed("y", lambda y, rng: y[None], True),
    "words": _named_by_words("U9"),
    "bytes": _named_by_words("S9"),
    "words, and classes": _changed("y", _words("U9"), True),
    "objects as labels": _changed("y", lambda y, rng: y.astype(object), True),
    "without classes": _unnamed,
    "from 1, or with holes": _shifted,
    **{
        f"a label of {value}": _changed("y", _with(value), True)
        for value in (-1, 3, 1000, 0.5, float("nan"), float("inf"), 2**40, 2**62)
    },
    "a label beyond train's": _changed("y", lambda y, rng: np.where(y == 1, 9, y), True, ("test",)),
    "labels short": _changed("y", lambda y, rng: y[:-2], True),
    "labels long": _changed("y", lambda y, rng: np.append(y, 0), True),
    "no labels": _changed("y", lambda y, rng: y[:0], True),
    "classes in bytes": _class_names(lambda rng: np.array(CLASSES).astype("S9"), False),
    "more classes": _class_names(lambda rng: np.array([*CLASSES, "dog", "eel"]), False),
    "fewer classes": _class_names(lambda rng: np.array(CLASSES[:2]), True),
    "classes twice": _class_names(lambda rng: np.array(["a", "a", "b"]), True),
    "classes of numbers": _class_names(lambda rng: np.array([30, 20, 10]), False),
    "classes as a table": _class_names(lambda rng: np.array([CLASSES]), False),
    "classes as objects": _class_names(lambda rng: np.array(CLASSES, object), True),
    "one name for all": _class_names(lambda rng: np.array("ant"), True),
    "odd names": _class_names(lambda rng: np.array(["a\nb", "ü😀", ""]), False),
}


def _damaged(change: Callable[[bytes, Random], bytes]) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        _finish(draft)
        draft.files[f"{ROOT}.npz"] = change(draft.files[f"{ROOT}.npz"], draft.rng)
        draft.odd()
        if change is flipped:  # in the directory of a zip that has no check sum: a name, a size
            draft.clean = Anything()

    return apply


OPTIONS = [
    *options_of("content", PIXELS),
    *options_of("encoding", DTYPES),
    *options_of("shape", SHAPES),
    *options_of("settings", LABELS),
    *options_of("names", NAMES),
    *options_of("damage", {name: _damaged(change) for name, change in OTHERS.items()}),
    *(option for option in LAYOUTS if option.name in ("data.path is a link",)),
]


def case(number: int, seed: int) -> Case:
    """Return an archive."""
    return make_case("archives", _begin, OPTIONS, number, seed)
