"""Find the annotations of a folder: COCO's, Pascal VOC's or YOLO's, of one kind."""

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from trainer.config.train import DataConfig, DataError
from trainer.data.detection.annotations import (
    AnnotatedPicture,
    Annotations,
    PictureIndex,
    first_names,
    require_train,
)
from trainer.data.detection.coco import load_coco, read_coco
from trainer.data.detection.voc import LISTS, load_voc, read_voc
from trainer.data.detection.yolo import NAMES, class_names, label_files, read_yolo
from trainer.data.folders import Entry, scan_folder

UNREAD = {  # why a file is not read where others of its suffix are annotations
    ".json": "no lists of images and annotations, as COCO's have them",
    ".xml": "no annotation of Pascal VOC's kind",
    ".txt": "a text without a picture of its name",
}


def read_annotations(config: DataConfig, root: Path) -> Annotations:
    """Return the annotations at data.path, a folder or one json file; raises DataError."""
    where = f"data.path={config.path}"
    top, left_out = scan_folder(root.parent if root.is_file() else root)
    files = [entry for entry in top.iter_files() if root.is_dir() or entry.path == root]
    index = PictureIndex(top)
    coco = [
        (entry, content)
        for entry in files
        if entry.suffix == ".json" and (content := load_coco(entry)) is not None
    ]
    voc = [
        (entry, annotation)
        for entry in files
        if entry.suffix == ".xml" and (annotation := load_voc(entry)) is not None
    ]
    texts = {entry.relative: entry for entry in files if entry.suffix == ".txt"}
    labels = label_files(index, {p: e for p, e in texts.items() if e.name.lower() not in NAMES})
    read = [e for e, _ in coco], [e for e, _ in voc], list(labels.values())
    _refuse_mixture(where, *read)
    if coco:
        found = read_coco(coco, index)
    elif voc:
        lists = [entry for place, entry in texts.items() if f"/{place}".count(f"/{LISTS}/")]
        found = read_voc(voc, index, lists)
    else:
        found = read_yolo(index, labels, class_names(files))
    found.counts.update(index.counts)
    found.left_out.update(_unread(files, index, found, {entry for of in read for entry in of}))
    require_train(where, found.splits)
    _refuse_twice(where, found)
    _refuse_unknown(where, found)
    return _hold_out(config, replace(found, left_out=left_out | found.left_out))


def _unread(
    files: list[Entry], index: PictureIndex, found: Annotations, read: set[Entry]
) -> dict[str, str]:
    """Return pictures without an annotation, and files that look like annotations and are none."""
    own = {picture.path for pictures in found.splits.values() for picture in pictures}
    left_out = dict.fromkeys(
        (entry.relative for entry in index.files if entry in files and entry.path not in own),
        "a picture that no annotation is read of",
    )
    suffix = next(iter(read)).suffix
    for entry in files:
        known = entry in read or entry.is_document or entry.name.lower() in NAMES
        if entry.suffix == suffix and not known:
            left_out[entry.relative] = UNREAD[suffix]
    return left_out


def _refuse_mixture(where: str, coco: list[Entry], voc: list[Entry], yolo: list[Entry]) -> None:
    kinds = {"COCO": coco, "Pascal VOC": voc, "YOLO": yolo}
    found = {
        kind: first_names(entry.relative for entry in entries)
        for kind, entries in kinds.items()
        if entries
    }
    if not found:
        raise DataError(
            f"{where} holds no boxes: data.kind=detection reads COCO's json files (train.json, "
            "valid.json, test.json), Pascal VOC's XML files, or YOLO's text files with a folder of "
            "pictures"
        )
    if len(found) > 1:
        told = " and ".join(f"{kind}'s annotations ({names})" for kind, names in found.items())
        raise DataError(
            f"{where} holds {told}, which may be the same boxes twice; keep those of one kind"
        )


def _refuse_twice(where: str, found: Annotations) -> None:
    """Raise DataError if a picture is in two splits, or annotated twice in one."""
    seen: dict[Path, str] = {}
    for split, pictures in found.splits.items():
        for picture in pictures:
            place = picture.path or Path(picture.name)
            if (first := seen.get(place)) is None:
                seen[place] = split
                continue
            raise DataError(
                f"{where}: {picture.name} is in the {first} split and in the {split} split; a "
                "picture must be in one"
                if first != split
                else f"{where}: {picture.name} is annotated twice in the {split} split; a picture "
                "must be there once, with all its boxes"
            )


def _refuse_unknown(where: str, found: Annotations) -> None:
    """Raise DataError if a split has boxes of a class that train has not."""
    if not found.class_names:
        raise DataError(f"{where} has no box in the train split, and no class; annotate some")
    for split, pictures in found.splits.items():
        others = sorted({name for picture in pictures for name in picture.classes})
        if unknown := [name for name in others if name not in found.class_names]:
            raise DataError(
                f"{where}: {first_names(unknown)} of the {split} split is not a class of the "
                f"train split, which has {first_names(found.class_names)}"
            )


def _hold_out(config: DataConfig, found: Annotations) -> Annotations:
    """Cut missing splits from train, by a hash of the pictures' names."""
    splits, sources = dict(found.splits), dict(found.sources)
    missing = [split for split in ("valid", "test") if split not in splits]
    train = sorted(splits["train"], key=_hash_of) if missing else splits["train"]
    count = round(len(train) * config.held_out / max(1, len(missing)))
    if missing and not 0 < count * len(missing) < len(train):
        raise DataError(
            f"data.held_out={config.held_out} of {len(train)} pictures leaves none for one of "
            f"train, {', '.join(missing)}; change data.held_out or give more pictures"
        )
    for split in missing:
        splits[split], train = train[-count:], train[:-count]
        sources[split] = (f"{count:,} pictures of train",)
    ordered = {split: splits[split] for split in ("train", "valid", "test")}
    return replace(found, splits=ordered | {"train": train}, sources=sources)


def _hash_of(picture: AnnotatedPicture) -> bytes:
    return blake2b(picture.name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
