"""Oddities of folders, for whatever is in them: spellings, rubbish, links, wrappers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from drafts import ROOT, Draft, Option, SkipOption, options_of

SPELLINGS = {
    "train": (
        "train",
        "Train",
        "TRAIN",
        "training",
        "Training",
        "train_set",
        "trainset",
        "train-data",
        "Training_Data",
        "TrainSet",
        "train_1",
        "data.train",
        "train-00000-of-00001",
        "train split",
    ),
    "valid": (
        "valid",
        "val",
        "dev",
        "validation",
        "VALID",
        "Val",
        "Validation",
        "eval",
        "valid_set",
        "dev-set",
        "ValidSet",
        "validation-00000-of-00001",
        "data.val",
        "evaluation",
        "val 2",
    ),
    "test": (
        "test",
        "Test",
        "TEST",
        "testing",
        "Testing",
        "test_set",
        "testset",
        "test-data",
        "TestData",
        "test_1",
        "data.test",
        "test-00000-of-00001",
        "tst",
    ),
}
ODD_NAMES = (
    "a b",
    "ümlaut",
    "u\u0308mlaut",
    "名前",
    "quo'te",
    'dou"ble',
    "per%cent",
    "a=b",
    "$HOME",
    "-dash",
    "semi;colon",
    "new\nline",
    "tab\tname",
    "x" * 120,
    "CAPS",
    "0",
    "007",
    "nan",
    "None",
    "a,b",
    "[x]",
    "{y}",
    "#1",
    "\udcff\udcfe",
    "back\\slash",
    "😀",
    "con",
    "a:b",
    "null",
    "1e3",
)


@dataclass(frozen=True)
class Item:
    """One file of the content: where it belongs, and what is in it."""

    split: str
    label: str  # the class of a picture
    stem: str
    suffix: str
    content: bytes


def placed(draft: Draft) -> list[str]:
    """Write the items down as files, if that is not done; return the names of all files."""
    items: list[Item] | None = draft.traits.pop("items", None)
    if items is not None:
        spelling = draft.traits.get("spelling", {})
        for item in items:
            place = draft.traits["place"](item, spelling.get(item.split, item.split))
            draft.files[f"{ROOT}/{place}" if place else ROOT] = item.content
    return [name for name in draft.files if name == ROOT or name.startswith(f"{ROOT}/")]


def _spelled(*splits: str) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        if "items" not in draft.traits or draft.traits.get("unsplit"):
            raise SkipOption
        spelling = draft.traits.setdefault("spelling", {})
        for split in splits:
            spelling[split] = draft.rng.choice(SPELLINGS[split])

    return apply


def _upper_suffix(draft: Draft) -> None:
    draft.traits["items"] = [
        replace(item, suffix=item.suffix.upper()) for item in draft.traits["items"]
    ]


def _odd_stems(draft: Draft) -> None:
    names = draft.rng.sample(ODD_NAMES, 2)
    items = draft.traits["items"]
    draft.traits["items"] = [
        replace(item, stem=f"{names[i % 2]}{item.stem}") for i, item in enumerate(items)
    ]


NAMES = options_of(
    "names",
    {
        "splits spelled": _spelled("train", "valid", "test"),
        "train spelled": _spelled("train"),
        "valid and test spelled": _spelled("valid", "test"),
        "upper-case suffix": _upper_suffix,
        "odd file names": _odd_stems,
    },
)


def _rubbish(*names: str, folder: str = "") -> Callable[[Draft], None]:
    """Copies of files, or foreign content, under names that are no data."""

    def apply(draft: Draft) -> None:
        files = placed(draft)
        if ROOT in files:
            raise SkipOption
        name = draft.rng.choice(sorted(files))
        parent = draft.rng.choice([str(p) for p in PurePosixPath(name).parents][:-1])
        content = draft.rng.choice((draft.files[name], b"rubbish\n", b"", b"\0\1\2\xff" * 9))
        new = draft.rng.choice(names).replace("NAME", PurePosixPath(name).name)
        draft.files["/".join(part for part in (parent, folder, new) if part)] = content

    return apply


def _folder(name: str) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        files = placed(draft)
        if ROOT in files:
            raise SkipOption
        parents = {str(p) for file in files for p in PurePosixPath(file).parents} - {"."}
        draft.folders.add(f"{draft.rng.choice(sorted(parents))}/{name}")

    return apply


def _pipe(draft: Draft) -> None:
    files = placed(draft)
    if ROOT in files:
        raise SkipOption
    name = draft.rng.choice(sorted(files))
    draft.pipes.add(f"{PurePosixPath(name).parent}/pipe{PurePosixPath(name).suffix}")


RUBBISH = options_of(
    "rubbish",
    {
        "hidden files": _rubbish(".DS_Store", "._NAME", ".NAME", ".gitkeep", ".NAME.swp"),
        "notebook checkpoints": _rubbish("NAME", "NAME-checkpoint", folder=".ipynb_checkpoints"),
        "__MACOSX": _rubbish("._NAME", "NAME", folder="__MACOSX"),
        "a repository": _rubbish("HEAD", "NAME", "config", folder=".git"),
        "backups": _rubbish("NAME.bak", "NAME~", "NAME.orig", "NAME.tmp", "#NAME#", "NAME.BAK"),
        "half a download": _rubbish("NAME.part", "NAME.crdownload"),
        "of the system": _rubbish("Thumbs.db", "desktop.ini", "THUMBS.DB"),
        "thumbnails": _rubbish("NAME", folder="@eaDir"),
        "foreign files": _rubbish(
            "labels.csv", "notes.pdf", "MD5SUMS", "x.json", "list.xml", "y.zip"
        ),
        "an empty folder": _folder("empty"),
        "an empty hidden folder": _folder(".cache"),
        "an empty folder of that name": _folder("images"),
        "a pipe": _pipe,
    },
)


def _wrapped(*names: str, beside: str = "") -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        if ROOT in placed(draft):
            raise SkipOption
        inside = "/".join((ROOT, *names))
        draft.moved(lambda name: inside + name.removeprefix(ROOT))
        draft.folders = {inside + name.removeprefix(ROOT) for name in draft.folders}
        draft.pipes = {inside + name.removeprefix(ROOT) for name in draft.pipes}
        if beside:
            draft.files[f"{ROOT}/{beside}"] = b"About these data.\n"

    return apply


def _links_to_files(draft: Draft) -> None:
    for number, name in enumerate(sorted(placed(draft))):
        suffix = PurePosixPath(name).suffix
        draft.files[f"store/{number}{suffix}"] = draft.files.pop(name)
        draft.links[name] = f"store/{number}{suffix}"


def _links_to_folders(depth: int) -> Callable[[Draft], None]:
    """Folders at this depth below data.path become links into a store."""

    def apply(draft: Draft) -> None:
        files = [name for name in sorted(placed(draft)) if name.count("/") > depth]
        if not files or draft.pipes or draft.folders or draft.links:
            raise SkipOption
        for name in files:
            parts = name.split("/")
            head, stored = "/".join(parts[: depth + 1]), "store/" + "~".join(parts[: depth + 1])
            draft.links[head] = stored
            draft.files["/".join((stored, *parts[depth + 1 :]))] = draft.files.pop(name)

    return apply


def _link(name: str, target: str) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        files = placed(draft)
        if ROOT in files:
            raise SkipOption
        deep = draft.rng.choice(sorted(files))
        parent = draft.rng.choice([str(p) for p in PurePosixPath(deep).parents][:-1])
        suffix = PurePosixPath(deep).suffix
        if any(head in draft.links for head in (parent, *map(str, PurePosixPath(parent).parents))):
            raise SkipOption
        link, leads = (text.replace("SUFFIX", suffix) for text in (name, target))
        draft.links[f"{parent}/{link}"] = leads.replace("HERE", parent)

    return apply


def _linked_root(draft: Draft) -> None:
    placed(draft)
    draft.links["there"] = draft.path
    draft.path = "there"


def _path(text: str) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        if ROOT in placed(draft):
            raise SkipOption
        draft.path = draft.path.replace(ROOT, text)

    return apply


def _renamed_root(draft: Draft) -> None:
    placed(draft)
    name = draft.rng.choice([odd for odd in ODD_NAMES if "/" not in odd])
    inside = f"{ROOT}/"

    def rename(old: str) -> str:
        return name + old.removeprefix(ROOT) if old == ROOT or old.startswith(inside) else old

    if any(target.startswith(ROOT) for target in draft.links.values()):
        raise SkipOption
    draft.files = {rename(old): content for old, content in draft.files.items()}
    draft.links = {rename(old): target for old, target in draft.links.items()}
    draft.folders, draft.pipes = {*map(rename, draft.folders)}, {*map(rename, draft.pipes)}
    draft.path = rename(draft.path)


LAYOUTS: list[Option] = options_of(
    "layout",
    {
        "in a wrapper": _wrapped("data-v1.0"),
        "in two wrappers": _wrapped("archive", "main"),
        "in a wrapper with a README": _wrapped("repository", beside="README.md"),
        "in a wrapper with a licence": _wrapped("repository", beside="LICENSE.txt"),
        "in a wrapper called data": _wrapped("Data"),
        "files are links": _links_to_files,
        "folders are links": _links_to_folders(1),
        "inner folders are links": _links_to_folders(2),
        "a link to the folder above": _link("loop", "HERE"),
        "a link to data.path": _link("again", ROOT),
        "a link to nothing": _link("gone", "nowhere"),
        "a file that is a link to nothing": _link("goneSUFFIX", "nowhere"),
        "a link to itself": _link("selfSUFFIX", "HERE/selfSUFFIX"),
        "data.path is a link": _linked_root,
        "data.path ends in a slash": _path(f"{ROOT}/"),
        "data.path goes up and down": _path(f"{ROOT}/../{ROOT}/."),
        "an odd name of data.path": _renamed_root,
    },
)
