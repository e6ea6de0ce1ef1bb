"""Image classification: an .npz of arrays, or a folder of class folders.

B images of a micro-batch · C channels · H rows = W columns of pixels
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trainer.config.train import ConfigError, DataConfig
from trainer.data import hub_images
from trainer.data.archive import read_archive
from trainer.data.cache import Record, build_folder, load_prepared, prepared_folder
from trainer.data.dataset import DataFacts, Dataset, Sample, SplitFacts
from trainer.data.files import FilePart, name_of
from trainer.data.folders import SPLITS, Entry, scan_folder
from trainer.data.image_files import (
    CheckedImages,
    ImageTable,
    check_gallery,
    list_gallery,
    tables_of,
)
from trainer.data.reader import DataReader
from trainer.data.record import read_record
from trainer.data.sampler import hash_to_seed

STATISTICS = 10_000  # training images used for mean and standard deviation


def prepare_splits(config: DataConfig, root: Path, progress: bool = False) -> DataFacts:
    """Check all images and compute train's statistics, unless already done; raises UserError."""
    scanned = _scan_root(root)
    folder = _images_folder(config, root, scanned)
    record = build_folder(
        folder, lambda temporary: _measure_images(config, root, scanned, progress)
    )
    known = with_processor(config, record)
    splits = {
        split: SplitFacts(sources=tuple(entry["sources"]), samples=entry["samples"])
        for split, entry in record["splits"].items()
    }
    return DataFacts(
        classes=len(known["class_names"]),
        image_size=record["shape"][0],
        channels=record["shape"][2],
        class_names=tuple(known["class_names"]),
        mean=tuple(known["mean"]),
        std=tuple(known["std"]),
        splits=splits,
        left_out=record["left_out"],
        notes=tuple(record["notes"]),
    )


def open_split(config: DataConfig, root: Path, split: str) -> "Images":
    """Return a split: an archive's images are in memory, a folder's are decoded on access."""
    scanned = _scan_root(root)
    record = load_prepared(_images_folder(config, root, scanned))
    table = _read_tables(config, root, scanned, record).tables[split]
    known = with_processor(config, record)
    rows = np.array([known["class_names"].index(name) for name in table.class_names])
    return Images(table.with_labels(rows), known, config.augment)


def with_processor(config: DataConfig, record: Record) -> Record:
    """Return the record with the classes and statistics of data.processor, if it is set."""
    if not config.processor:
        return record
    theirs = read_record(config.processor)
    if theirs is None or not theirs.class_names:
        raise ConfigError(
            f"data.processor={config.processor} has no record of images; name the folder of a run, "
            f"or of an exported model, of data.kind={config.kind}"
        )
    shape = [theirs.image_size, theirs.image_size, theirs.channels]
    if list(record["shape"]) != shape:
        found, wanted = (" × ".join(map(str, sizes)) for sizes in (record["shape"], shape))
        raise ConfigError(
            f"data.path={config.path} holds images of {found} (rows, columns, channels), but "
            f"data.processor={config.processor} expects {wanted}; give images of that shape"
        )
    if unknown := [name for name in record["class_names"] if name not in theirs.class_names]:
        raise ConfigError(
            f"data.path={config.path} has the class {', '.join(unknown)}, but data.processor="
            f"{config.processor} has {', '.join(theirs.class_names)}; remove it, or start a "
            "run with data.processor=new"
        )
    known = {"class_names": theirs.class_names, "mean": theirs.mean, "std": theirs.std}
    return record | {key: list(values) for key, values in known.items()}


class Images(Dataset):
    """A split of labelled square images; training shifts and mirrors each at random."""

    def __init__(self, table: ImageTable, record: Record, augment: bool):
        self._table = table
        self._augment = augment
        self._mean, self._std = record["mean"], record["std"]
        # Up to 1 pixel each way of 28 or 32, 8 of 224: about the same fraction of any size.
        self._reach = max(1, record["shape"][0] // 28)

    def __len__(self) -> int:
        return len(self._table.labels)

    def sample(self, index: int, seed: int | None) -> Sample:
        """Return images (C, H, W) uint8 and targets () int64."""
        image_HWC = self._table.read_image(index)
        if seed is not None and self._augment:
            image_HWC = _augment_image(image_HWC, hash_to_seed(seed, index), self._reach)
        return {"images": image_HWC.transpose(2, 0, 1), "targets": self._table.labels[index]}

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Return images (B, C, H, W) float32, standardized by train's statistics; targets (B,)."""
        images_BCHW = np.stack([sample["images"] for sample in samples])
        return {
            "images": standardize_images(images_BCHW, self._mean, self._std),
            "targets": np.stack([sample["targets"] for sample in samples]),
        }


def standardize_images(
    images_BCHW: np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """Return uint8 pixels as float32, standardized by mean and deviation per channel (C,)."""
    mean_C11, std_C11 = (np.array(values, np.float32)[:, None, None] for values in (mean, std))
    return np.asarray((images_BCHW.astype(np.float32) / 255 - mean_C11) / std_C11)


def _augment_image(image_HWC: np.ndarray, bits: int, reach: int) -> np.ndarray:
    """Return the image mirrored or not, shifted by up to ±`reach` pixels, padded with zeros.

    `bits` are random and choose the mirroring and the shift.
    """
    height, width, _ = image_HWC.shape
    if bits & 1:
        image_HWC = image_HWC[:, ::-1]
    down, right = ((bits >> low) % (2 * reach + 1) for low in (1, 32))
    padded = np.pad(image_HWC, ((reach, reach), (reach, reach), (0, 0)))
    return padded[down : down + height, right : right + width]


# result of `scan_folder` for a folder; None = an archive
Scanned = tuple[Entry, dict[str, str]] | None


def _scan_root(root: Path) -> Scanned:
    return None if root.is_file() else scan_folder(root)


def _images_folder(config: DataConfig, root: Path, scanned: Scanned) -> Path:
    fingerprints = (
        [FilePart(root, 0, 0).file_fingerprint()]
        if scanned is None
        else [file.fingerprint() for file in scanned[0].iter_files()]
    )
    ingredients = [*fingerprints, config.held_out, config.on_bad_file]
    return prepared_folder(config, name_of(config), ingredients)


@dataclass(frozen=True)
class _FoundTables:
    tables: dict[str, ImageTable]
    sources: dict[str, tuple[str, ...]]
    left_out: dict[str, str]
    notes: list[str]


def _read_tables(
    config: DataConfig,
    root: Path,
    scanned: Scanned,
    record: Record | None = None,
    progress: bool = False,
) -> _FoundTables:
    """Return the tables of all splits; a missing one is cut from train.

    `record` is that of files checked before; None = check them now.
    """
    if scanned is None:
        archive = read_archive(config, root)
        found = _FoundTables(archive.tables, dict(archive.sources), archive.left_out, [])
    else:
        gallery = list_gallery(config, scanned)
        checked = (
            check_gallery(config, gallery, progress)
            if record is None
            else CheckedImages(tuple(record["shape"]), record["damaged"])
        )
        sources = {
            split: tuple(f"{folder.relative_to(root)}/" for folder in folders)
            for split, folders in gallery.listing.splits.items()
        }
        found = _FoundTables(
            tables_of(gallery, checked.shape, checked.damaged),
            sources,
            gallery.listing.left_out | checked.damaged,
            gallery.listing.notes + checked.notes,
        )
    hold_out_tables(config, found.tables, found.sources)
    return replace(found, tables={split: found.tables[split] for split in SPLITS})


def hold_out_tables(
    config: DataConfig, tables: dict[str, ImageTable], sources: dict[str, tuple[str, ...]]
) -> None:
    """Cut the missing splits from the end of train, in the order of its table."""
    missing = [split for split in ("valid", "test") if split not in tables]
    train = tables["train"]
    count = round(len(train.labels) * config.held_out / max(1, len(missing)))
    if missing and not 0 < count * len(missing) < len(train.labels):
        raise ConfigError(
            f"data.held_out={config.held_out} of {len(train.labels)} images leaves none for one of "
            f"train, {', '.join(missing)}; change data.held_out or give more images"
        )
    for split in missing:
        tables[split] = train.select_rows(train.order[-count:])
        train = tables["train"] = train.select_rows(train.order[:-count])
        sources[split] = (f"{count:,} images of train",)


def _measure_images(config: DataConfig, root: Path, scanned: Scanned, progress: bool) -> Record:
    found = _read_tables(config, root, scanned, None, progress)
    train = found.tables["train"]
    count = len(train.labels)
    rows = np.linspace(0, count - 1, min(count, STATISTICS)).astype(int)
    pixels, total_C, square_C = 0, np.zeros(train.shape[2]), np.zeros(train.shape[2])
    for row in rows:
        image_PC = train.read_image(row).reshape(-1, train.shape[2]) / 255
        pixels += len(image_PC)
        total_C, square_C = total_C + image_PC.sum(0), square_C + (image_PC**2).sum(0)
    mean_C = total_C / pixels
    std_C = np.sqrt(np.maximum(square_C / pixels - mean_C**2, 0))
    damaged = {name: why for name, why in found.left_out.items() if why.startswith("damaged")}
    return {
        "class_names": list(train.class_names),
        "shape": train.shape,
        "mean": mean_C.tolist(),
        "std": np.where(std_C > 0, std_C, 1.0).tolist(),  # a constant channel has deviation 0
        "splits": {
            split: {"samples": len(table.labels), "sources": found.sources[split]}
            for split, table in found.tables.items()
        },
        "damaged": damaged,
        "left_out": found.left_out,
        "notes": found.notes,
    }


READER = DataReader(
    "images",
    ("encoder",),
    "patches",
    prepare_splits,
    open_split,
    hub_images.FORMAT,
    outputs=("classes",),
)
