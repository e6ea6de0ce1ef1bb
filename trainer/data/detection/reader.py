"""Detection: pictures with boxes in COCO's, Pascal VOC's or YOLO's files, or scenes of items."""

from pathlib import Path

import numpy as np

from trainer.config.train import ConfigError, DataConfig
from trainer.data.archive import read_archive
from trainer.data.cache import Record, build_folder, load_prepared, prepared_folder
from trainer.data.dataset import DataFacts, SplitFacts
from trainer.data.detection.augment import Augmentation
from trainer.data.detection.canvas import SCENES, Canvas
from trainer.data.detection.dataset import CanvasSplit, DetectionSplit, StoredSplit
from trainer.data.detection.files import read_annotations
from trainer.data.detection.prepare import measure_pixels, read_pictures, write_pictures
from trainer.data.files import FilePart, name_of
from trainer.data.folders import SPLITS, scan_folder
from trainer.data.image_files import ImageTable
from trainer.data.images import hold_out_tables, with_processor
from trainer.data.reader import DataReader, HubFormat

ARCHIVE = ".npz"  # labelled images, of which scenes are made
MEASURED = 500  # scenes


def prepare_splits(config: DataConfig, root: Path, progress: bool = False) -> DataFacts:
    """Check all pictures and boxes, and fit the pictures into squares, unless already done."""
    folder = _prepared_folder(config, root)
    record = build_folder(folder, lambda temporary: _fill(config, root, temporary, progress))
    known = with_processor(config, record)
    return DataFacts(
        classes=len(known["class_names"]),
        image_size=record["shape"][0],
        channels=record["shape"][2],
        class_names=tuple(known["class_names"]),
        mean=tuple(known["mean"]),
        std=tuple(known["std"]),
        splits={
            split: SplitFacts(sources=tuple(entry["sources"]), samples=entry["samples"])
            for split, entry in record["splits"].items()
        },
        left_out=record["left_out"],
        notes=tuple(record["notes"]),
    )


def open_split(config: DataConfig, root: Path, split: str) -> DetectionSplit:
    """Return a split after `prepare_splits`."""
    folder = _prepared_folder(config, root)
    record = load_prepared(folder)
    known = with_processor(config, record)
    rows = np.array([known["class_names"].index(name) for name in record["class_names"]])
    if root.suffix == ARCHIVE:
        table = _read_tables(config, root)[0][split].with_labels(rows)
        return CanvasSplit(Canvas(table, config.image_size), split, known, config.augment)
    chosen = Augmentation(config.flips, config.zoom, config.shift) if config.augment else None
    stored = [
        picture.with_classes(rows) for picture in read_pictures(folder, split, config.image_size)
    ]
    return StoredSplit(folder / f"{split}.npy", stored, known, chosen)


def _prepared_folder(config: DataConfig, root: Path) -> Path:
    if root.is_file():
        ingredients = [FilePart(root, 0, 0).file_fingerprint()]
    else:
        ingredients = [file.fingerprint() for file in scan_folder(root)[0].iter_files()]
    chosen = [config.held_out, config.on_bad_file, config.image_size]
    return prepared_folder(config, name_of(config), [*ingredients, *chosen])


def _fill(config: DataConfig, root: Path, folder: Path, progress: bool) -> Record:
    if root.suffix != ARCHIVE:
        return write_pictures(config, read_annotations(config, root), folder, progress)
    tables, sources = _read_tables(config, root)
    canvas = Canvas(tables["train"], config.image_size)
    scenes = [canvas.draw_scene(0, index, mirrors=False)[0] for index in range(MEASURED)]
    return {
        "class_names": list(tables["train"].class_names),
        "shape": [config.image_size, config.image_size, tables["train"].shape[2]],
        **measure_pixels(np.stack(scenes)),
        "splits": {
            split: {"samples": SCENES[split], "sources": [f"scenes of {', '.join(sources[split])}"]}
            for split in SPLITS
        },
        "left_out": {},
        "notes": [],
    }


def _read_tables(
    config: DataConfig, root: Path
) -> tuple[dict[str, ImageTable], dict[str, tuple[str, ...]]]:
    """Return the items of each split of an archive, and what they are made of."""
    archive = read_archive(config, root)
    tables, sources = dict(archive.tables), dict[str, tuple[str, ...]](archive.sources)
    hold_out_tables(config, tables, sources)
    return tables, sources


def _refuse_hub(config: DataConfig, folder: Path, rows: object) -> None:
    raise ConfigError(
        f"data.path={config.path}: data.kind=detection does not read Hugging Face data sets; "
        "write COCO's json files, and name their folder"
    )


def find_problems(config: DataConfig) -> list[str]:
    """Return the problems of the settings alone."""
    if config.path.startswith("hf:"):
        return [
            f"data.path={config.path}: data.kind=detection does not read Hugging Face data sets; "
            "write them as COCO's json files, and name their folder"
        ]
    return []


READER = DataReader(
    "detection",
    ("encoder", "encoder_decoder"),
    "patches",
    prepare_splits,
    open_split,
    HubFormat((), _refuse_hub),
    find_problems,
    outputs=("boxes",),
)
