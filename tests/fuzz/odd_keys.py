"""Names of the arrays in an archive, arrays more and arrays less."""

from collections.abc import Callable

import numpy as np
from drafts import Draft

PER_CLASS = {"train": 3, "valid": 1, "test": 1}


KEYS = {
    "train": ("train", "Train", "training", "trn", "train_set", "TRAIN"),
    "valid": ("valid", "val", "dev", "validation", "Val", "eval"),
    "test": ("test", "Test", "testing", "tst", "test_set", "TEST"),
}


def _key(template: str, odd: bool = False) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        draft.traits["key"] = template
        if odd:
            draft.odd()

    return apply


def _spelled(draft: Draft) -> None:
    draft.traits["spelled"] = {split: draft.rng.choice(names) for split, names in KEYS.items()}


def _roles(x: str, y: str, odd: bool = False) -> Callable[[Draft], None]:
    def apply(draft: Draft) -> None:
        renamed = draft.traits.setdefault("renamed", {})
        for split in PER_CLASS:
            for role, name in (("x", x), ("y", y)):
                renamed[role, split] = name.format(split=split)
        if odd:
            draft.odd()

    return apply


def _more(key: str, odd: bool = False) -> Callable[[Draft], None]:
    """An array more; one that reads like another of the splits may be refused."""

    def apply(draft: Draft) -> None:
        draft.traits["arrays"][key] = draft.rng.choice((np.zeros(3), np.array("text"), np.zeros(0)))
        if odd:
            draft.odd()

    return apply


def _without(*keys: str) -> Callable[[Draft], None]:
    """Without some of the splits: they are cut from train; without a role it is refused."""

    def apply(draft: Draft) -> None:
        for key in keys:
            draft.traits["arrays"].pop(key)
        whole = [key for key in ("valid", "test") if {f"x {key}", f"y {key}"} <= set(keys)]
        if len(keys) != 2 * len(whole):
            draft.odd()
        for split in whole:
            del draft.clean.splits[split]
        draft.settings["held_out"] = 0.5

    return apply


NAMES = {
    "splits spelled": _spelled,
    "split first": _key("{split}_{role}"),
    "joined": _key("{role}{split}", True),
    "with a dash": _key("{role}-{split}"),
    "with a slash": _key("{split}/{role}"),
    "images and labels": _roles("{split}_images", "{split}_labels"),
    "image and label": _roles("image_{split}", "label_{split}"),
    "capitals": _roles("X_{split}", "Y_{split}"),
    "pixels and targets": _roles("pixels_{split}", "targets_{split}"),
    "data and labels": _roles("{split}_data", "{split}_labels", True),
    "without roles": _roles("{split}", "{split}s", True),
    "an array more": _more("extra"),
    "mean and std": _more("mean"),
    "file names": _more("names_train"),
    "two of train": _more("images_train", True),
    "an unknown split": _more("x_holdout"),
    "only train": _without("x valid", "y valid", "x test", "y test"),
    "no valid": _without("x valid", "y valid"),
    "no test": _without("x test", "y test"),
    "no labels of valid": _without("y valid"),
    "no pictures of test": _without("x test"),
    "no train": _without("x train", "y train"),
    "no pictures of train": _without("x train"),
}
