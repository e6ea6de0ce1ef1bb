"""Oddities of folders of pictures with boxes: of numbers, ids, names, lists and pictures."""

import json
from collections.abc import Callable
from io import BytesIO
from random import Random
from typing import Any

from boxed_files import CLASSES, COUNTS, FORMATS, WRITERS, begin, written
from drafts import ROOT, Case, Draft, SkipOption, make_case, options_of
from judge import Anything
from PIL import Image


def _as(kind: str) -> Callable[[Draft], None]:
    return lambda draft: draft.traits.update(format=kind)


def _background(draft: Draft) -> None:
    pictures = draft.traits["pictures"]
    pictures[draft.rng.randrange(1, len(pictures))].boxes = []


def _missing_splits(draft: Draft) -> None:
    gone = draft.rng.choice((("valid",), ("test",), ("valid", "test"), ("train",)))
    kept = [picture for picture in draft.traits["pictures"] if picture.split not in gone]
    draft.traits["pictures"] = kept
    if "train" in gone:
        draft.odd()


def _repeated_box(draft: Draft) -> None:
    """A box is listed twice: it is one."""
    written(draft)
    name = next(
        n for n in _annotations(draft) if n.endswith(("train.json", "train-0.xml", "0.txt"))
    )
    text = draft.files[name].decode()
    if name.endswith(".json"):
        content = json.loads(text)
        content["annotations"].append(content["annotations"][0] | {"id": 999})
        text = json.dumps(content)
    elif name.endswith(".xml"):
        first = text[text.index("<object>") : text.index("</object>") + 9]
        text = text.replace("</annotation>", f"{first}</annotation>")
    else:
        text += text.splitlines()[0]
    draft.files[name] = text.encode()


def _annotations(draft: Draft) -> list[str]:
    written(draft)
    names = sorted(draft.files)
    found = [n for n in names if n.endswith((".json", ".xml")) or "/labels/" in n]
    return [name for name in found if draft.files[name]]


def _edited(
    change: Callable[[bytes, Random], bytes], unknown: bool = False
) -> Callable[[Draft], None]:
    """Change the bytes of one annotation file."""

    def apply(draft: Draft) -> None:
        name = draft.rng.choice(_annotations(draft))
        draft.files[name] = change(draft.files[name], draft.rng)
        draft.odd()
        if unknown:
            draft.clean = Anything()

    return apply


def _everywhere(change: Callable[[bytes], bytes]) -> Callable[[Draft], None]:
    """Write all annotation files in another way that means the same."""

    def apply(draft: Draft) -> None:
        for name in _annotations(draft):
            draft.files[name] = change(draft.files[name])

    return apply


def _number(new: str) -> Callable[[bytes, Random], bytes]:
    """Put something in place of one of the numbers of the file."""

    def change(content: bytes, rng: Random) -> bytes:
        text, spans = content.decode("utf-8", "surrogateescape"), list[tuple[int, int]]()
        start = 0
        for place, letter in enumerate(f"{text} "):
            if letter not in "0123456789.":
                if start < place and text[start - 1 : start] in (" ", ">", "\n", "", "["):
                    spans.append((start, place))
                start = place + 1
        if not spans:
            raise SkipOption
        first, end = rng.choice(spans)
        return (text[:first] + new + text[end:]).encode("utf-8", "surrogateescape")

    return change


NUMBERS = (
    *("-1", "-3.5", "0", "1.2", "2", "7", "99", "NaN", "nan", "Infinity", "-inf", "1e999", "1e-9"),
    *("9" * 30, "9" * 400, "9" * 5000, '"5"', '"x"', "x", "0,5", "1_0", "null", "true", "[]", "{}"),
    *("", " ", "0x10", "1.", "--1", "½", "٣", "1e3", "\u00a05", '"\\ud800"', "1 2"),
)
# Another number is another box: nobody can know.
KNOWN = (
    *("-1", "-3.5", "0", "1.2", "2", "7", "99", "1e-9", "1.", "1e3", "٣", "\u00a05", "1 2"),
    "",
)
TEXTS = (b"", b"\0", b"{", b"[1]", b"{}", b"null", b"<annotation/>", b"<annotation>", b"<a/>")


def _token(content: bytes, rng: Random) -> bytes:
    """Put another word for a word of the file."""
    words = [
        w
        for w in (
            b"bbox",
            b"image_id",
            b"category_id",
            b"id",
            b"file_name",
            b"name",
            b"iscrowd",
            b"images",
            b"annotations",
            b"categories",
            b"width",
            b"object",
            b"bndbox",
            b"xmin",
            b"ymax",
            b"filename",
            b"size",
            b"annotation",
            b"difficult",
            b"dot",
            b"train-",
        )
        if w in content
    ]
    if not words:
        raise SkipOption
    new = rng.choice((b"other", b"", b"name", b"bbox", b"<", b"\xff", b"id", b"&amp;", b"../x"))
    word = rng.choice(words)
    return content.replace(word, new) if rng.random() < 0.4 else content.replace(word, new, 1)


def _flipped(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _coordinates(draft: Draft, corners: tuple[float, float, float, float]) -> None:
    """Give one box of the first picture other corners than it has."""
    picture = draft.traits["pictures"][0]
    kind = picture.boxes[1][0]
    picture.boxes[1] = (kind, *corners)
    draft.odd()


def _picture(change: Callable[[bytes, Random], bytes | None]) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        written(draft)
        name = draft.rng.choice([n for n in sorted(draft.files) if n.endswith(".png")])
        new = change(draft.files.pop(name), draft.rng)
        if new is not None:
            draft.files[name] = new
        draft.odd()
        if draft.rng.random() < 0.4:
            draft.settings["on_bad_file"] = "skip"
        if change is _resized and draft.traits["format"] == "yolo":  # which states no size
            draft.clean = Anything()

    return apply


def _turned(content: bytes, rng: Random) -> bytes:
    image, exif, file = Image.open(BytesIO(content)), Image.Exif(), BytesIO()
    exif[0x0112] = rng.randint(2, 8)
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


def _resized(content: bytes, rng: Random) -> bytes:
    file = BytesIO()
    size = rng.choice(((8, 16), (32, 16), (16, 9)))
    Image.open(BytesIO(content)).resize(size).save(file, "PNG")
    return file.getvalue()


def _coco(change: Callable[[dict[str, Any], Random], None], odd: bool) -> Callable[[Draft], None]:
    """Change the content of COCO's file of train."""

    def apply(draft: Draft) -> None:
        draft.traits["format"] = "coco" if "pictures" in draft.traits else draft.traits["format"]
        if draft.traits["format"] != "coco":
            raise SkipOption
        written(draft)
        content = json.loads(draft.files[f"{ROOT}/train.json"])
        change(content, draft.rng)
        draft.files[f"{ROOT}/train.json"] = json.dumps(content).encode()
        if odd:
            draft.odd()
        if change in (_value, _crowd):
            draft.clean = Anything()

    return apply


def _ids(new: Callable[[Any], Any], old: Callable[[Any], Any]) -> Callable[[Any, Random], None]:
    def change(content: dict[str, Any], rng: Random) -> None:
        for image in content["images"]:
            image["id"] = new(image["id"])
        for category in content["categories"]:
            category["id"] = new(category["id"])
        for box in content["annotations"]:
            box["image_id"], box["category_id"] = old(box["image_id"]), old(box["category_id"])

    return change


def _set(table: str, key: str, value: Any) -> Callable[[dict[str, Any], Random], None]:
    def change(content: dict[str, Any], rng: Random) -> None:
        rng.choice(content[table])[key] = value

    return change


def _crowd(content: dict[str, Any], rng: Random) -> None:
    rng.choice(content["annotations"])["iscrowd"] = 1


VALUES = ("text", -1, 0, 0.5, None, [], {}, True, 10**400, "1", "../x.png", ".", float("nan"))


def _value(content: dict[str, Any], rng: Random) -> None:
    """Give one field of one row another value, or none."""
    row = rng.choice(content[rng.choice(("images", "annotations", "categories"))])
    key = rng.choice(sorted(row))
    row[key] = rng.choice(VALUES)
    if rng.random() < 0.2:
        row.pop(key)


def _added(name: str, content: bytes, odd: bool = True) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        written(draft)
        draft.files[f"{ROOT}/{name}"] = content
        if odd:
            draft.odd()

    return apply


def _second_format(draft: Draft) -> None:
    pictures = draft.traits["pictures"]
    first = draft.traits["format"]
    written(draft)
    other = draft.rng.choice([kind for kind in FORMATS if kind != first])
    WRITERS[other](draft, pictures)
    draft.odd()


def _yaml(text: str, odd: bool = True, names: tuple[str, ...] = CLASSES) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        if "pictures" in draft.traits:
            draft.traits["format"] = "yolo"
        written(draft)
        if draft.traits["format"] != "yolo":
            raise SkipOption
        draft.files[f"{ROOT}/data.yaml"] = text.encode()
        for pictures in draft.clean.splits.values():
            for _, boxes in pictures:
                boxes[:] = [(names[CLASSES.index(name)], *rest) for name, *rest in boxes]
        if odd:
            draft.odd()

    return apply


def _lists(text: Callable[[str, list[str]], str], odd: bool) -> Callable[[Draft], None]:
    """Write VOC's lists of each split, and all else into one folder."""

    def apply(draft: Draft) -> None:
        draft.traits["format"] = "voc"
        written(draft)
        for split in COUNTS:
            names = [n for n in draft.files if n.startswith(f"{ROOT}/{split}/")]
            stems = sorted({n.rpartition("/")[2].rpartition(".")[0] for n in names})
            for name in names:
                folder = "Annotations" if name.endswith(".xml") else "JPEGImages"
                draft.files[f"{ROOT}/{folder}/{name.rpartition('/')[2]}"] = draft.files.pop(name)
            draft.files[f"{ROOT}/ImageSets/Main/{split}.txt"] = text(split, stems).encode()
        if odd:
            draft.odd()

    return apply


OPTIONS = [
    *options_of("content", {kind: _as(kind) for kind in FORMATS}),
    *options_of(
        "shape",
        {
            "background": _background,
            "splits are missing": _missing_splits,
            "from right to left": lambda draft: _coordinates(draft, (9, 6, 3, 2)),
            "outside": lambda draft: _coordinates(draft, (20, 2, 25, 5)),
            "over the edge": lambda draft: _coordinates(draft, (-4, 2, 6, 12)),
            "without area": lambda draft: _coordinates(draft, (4, 2, 4, 5)),
            "far away": lambda draft: _coordinates(draft, (1e30, 2, 1e31, 5)),
            "a box twice": _repeated_box,
            "two formats": _second_format,
            "ids as text": _coco(_ids(str, str), False),
            "ids as text on one side": _coco(_ids(str, lambda number: number), False),
            "ids as fractions": _coco(_ids(float, lambda number: number), False),
            "huge ids": _coco(_ids(lambda n: 10**30 + n, lambda n: 10**30 + n), False),
            "a category without a row": _coco(_set("annotations", "category_id", 55), True),
            "an image without a row": _coco(_set("annotations", "image_id", 55), True),
            "a crowd": _coco(_crowd, False),
            "an image id twice": _coco(_set("images", "id", 1), True),
            "another value": _coco(_value, True),
            "another value, again": _coco(_value, True),
            "names as a table": _yaml("names: {0: dot, 1: bar, 2: ring}", False),
            "names of text numbers": _yaml("names: {'0': dot, '1': bar, '2': ring}", False),
            "names as a word": _yaml("names: dot"),
            "too few names": _yaml("names: [dot, bar]"),
            "names twice": _yaml("names: [dot, dot, ring]"),
            "names that are yes and no": _yaml("names: [yes, no, on]", False, ("yes", "no", "on")),
            "names that are lists": _yaml("names: [[dot], [bar]]"),
            "damaged names": _yaml("names: [dot, bar"),
            "other names": _added("classes.txt", b"a\nb\nc\n"),
            "lists": _lists(lambda split, stems: "\n".join(stems), False),
            "lists of a class": _lists(
                lambda s, stems: "".join(f"{n}  1\r\n" for n in stems), False
            ),
            "lists of files": _lists(lambda s, stems: "".join(f"{n}.png\n" for n in stems), False),
            "lists with a mark": _lists(lambda s, stems: "\ufeff" + "\n".join(stems), False),
            "lists that meet": _lists(lambda s, stems: "\n".join([*stems, "train-1"]), True),
            "lists with too much": _lists(lambda s, stems: "\n".join([*stems, "gone"]), True),
            "short lists": _lists(lambda s, stems: "\n".join(stems[1:]), True),
        },
    ),
    *options_of(
        "encoding",
        {
            "a byte order mark": _everywhere(lambda content: b"\xef\xbb\xbf" + content),
            "CRLF": _everywhere(lambda content: content.replace(b"\n", b"\r\n")),
            "blank lines": _everywhere(lambda content: content.replace(b"\n", b"\n\n") + b"\n"),
            "UTF-16": _edited(lambda content, rng: content.decode().encode("utf-16")),
        },
    ),
    *options_of(
        "damage",
        {
            **{f"a number is {n[:12]}": _edited(_number(n), n in KNOWN) for n in NUMBERS},
            "another word": _edited(_token, True),
            "another word, again": _edited(_token, True),
            "flipped": _edited(_flipped, True),
            "cut": _edited(lambda content, rng: content[: int(len(content) * rng.random())]),
            "more behind": _edited(lambda c, rng: c + rng.choice((b"}", b"x", b"\0", b"0 1", c))),
            "something else": _edited(lambda content, rng: rng.choice(TEXTS)),
            "a picture is missing": _picture(lambda content, rng: None),
            "a picture is damaged": _picture(lambda content, rng: content[:30]),
            "a picture is turned": _picture(_turned),
            "a picture of another size": _picture(_resized),
        },
    ),
    *options_of(
        "rubbish",
        {
            "a json file of another kind": _added("package.json", b'{"a": 1}', False),
            "an XML file of another kind": _added("x.xml", b"<html/>", False),
            "notes": _added("notes.txt", b"0 1 2 hello", False),
            "a readme": _added("README.txt", b"about", False),
            "hidden": _added(".hidden.json", b"{", False),
        },
    ),
]


def case(number: int, seed: int) -> Case:
    """Return a folder of pictures with boxes."""
    return make_case("boxes", begin, OPTIONS, number, seed, written)
