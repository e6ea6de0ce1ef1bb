"""The one judge of the fuzzer over files: what is read of an odd input, beside the clean one."""

import faulthandler
import logging
import re
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from drafts import Case, emptied

from trainer import data
from trainer.config.loss import IGNORED
from trainer.config.train import DataConfig, UserError
from trainer.data import files as source
from trainer.data import folders, text
from trainer.data.dataset import DataFacts
from trainer.data.record import format_record, read_record, write_record

LIMIT_SECONDS = 120
PATCHED = {"block": (source, "BLOCK"), "piece": (text, "PIECE")}

REFUSED, EQUAL, SAID = "refused", "equal", "said"
TRACEBACK, SILENT, HANG, NEEDLESS = "traceback", "silent", "hang", "needless"
FAULTS = (TRACEBACK, SILENT, HANG, NEEDLESS)


@dataclass(frozen=True)
class Anything:
    """What nobody can know, e.g. of a changed byte in a file that has no check sum."""

    def difference(self, config: DataConfig, facts: DataFacts) -> str:
        """Read all of it, to see that this can be done."""
        for split in folders.SPLITS:
            dataset = data.open_split(config, split)
            dataset.collate([dataset.sample(i, None) for i in range(len(dataset))])
        return ""


@dataclass(frozen=True)
class Images:
    """(class name, pixels (H, W, 3)) of each split; only train: of all splits together."""

    splits: dict[str, list[tuple[str, np.ndarray]]]
    tolerance: list[int] = field(default_factory=lambda: [0])  # the largest counts

    def difference(self, config: DataConfig, facts: DataFacts) -> str:
        """Say how what is read differs; empty where it does not."""
        found = {}
        for split in folders.SPLITS:
            dataset = data.open_split(config, split)
            samples = [dataset.sample(i, None) for i in range(len(dataset))]
            batch = dataset.collate([dataset.sample(i, 7) for i in range(len(dataset))])
            if not np.isfinite(batch["images"]).all():
                return f"{split}: pixels that are not finite"
            found[split] = [
                (facts.class_names[int(s["targets"])], s["images"].transpose(1, 2, 0))
                for s in samples
            ]
        for split, (wanted, here) in _matched(self.splits, found).items():
            if Counter(c for c, _ in wanted) != Counter(c for c, _ in here):
                classes = [dict(sorted(Counter(c for c, _ in x).items())) for x in (here, wanted)]
                return f"{split}: classes {classes[0]}, not {classes[1]}"
            left = [(c, np.broadcast_to(p, (*p.shape[:2], 3)).astype(int)) for c, p in here]
            for name, pixels in wanted:
                near = [(_distance(p, pixels), i) for i, (c, p) in enumerate(left) if c == name]
                distance, place = min(near)
                if distance > max(self.tolerance):
                    return f"{split}: a picture of {name} is off by {distance}"
                left.pop(place)
        return ""


def _distance(one: np.ndarray, other: np.ndarray) -> int:
    if one.shape != other.shape:
        return 256
    return int(abs(one - other.astype(int)).max())


@dataclass(frozen=True)
class Texts:
    """The documents of each split; only train: of all splits together, as a set of lines."""

    splits: dict[str, list[str]]

    def difference(self, config: DataConfig, facts: DataFacts) -> str:
        """Say how what is read differs; empty where it does not."""
        tokenizer = data.open_tokenizer(config)
        found = {}
        for split in folders.SPLITS:
            dataset = data.open_split(config, split)
            ids: list[int] = []
            for index in range(len(dataset)):
                sample = dataset.sample(index, None)
                dataset.sample(index, 7)
                known = sample["targets"] != IGNORED
                ids += sample["tokens"][known].tolist()
                last = sample["targets"][known][-1:].tolist()
            found[split] = _documents([*ids, *last], tokenizer)
            if dataset.characters != facts.splits[split].characters:
                return f"{split}: {dataset.characters} characters"
        for split, (wanted, here) in _matched(self.splits, found).items():
            lines = [Counter(s for d in x for s in re.split("[\n\r]+", d)) for x in (wanted, here)]
            for counter in lines:
                counter.pop("", None)
            if lines[0] != lines[1] or (split != "train" and sorted(wanted) != sorted(here)):
                missing, more = lines[0] - lines[1], lines[1] - lines[0]
                return f"{split}: without {_few(missing)}, with {_few(more)}"
            ends = [sum(d.count("\r") for d in x) for x in (here, wanted)]
            if ends[0] != ends[1]:
                return f"{split}: {ends[0]} carriage returns, not {ends[1]}"
        return ""


def _few(counter: Counter[Any]) -> str:
    return repr(list(counter)[:2])[:160]


def _documents(ids: list[int], tokenizer: Any) -> list[str]:
    documents: list[list[int]] = []
    for token in ids:
        if token == tokenizer.eot_id or not documents:
            documents.append([])
        if token != tokenizer.eot_id:
            documents[-1].append(token)
    return [text for text in map(tokenizer.decode, documents) if text]


@dataclass(frozen=True)
class Pairs:
    """(source, target) of each split; only train: of all splits together."""

    splits: dict[str, list[tuple[str, str]]]

    def difference(self, config: DataConfig, facts: DataFacts) -> str:
        """Say how what is read differs; empty where it does not."""
        tokenizer = data.open_tokenizer(config)
        assert tokenizer is not None
        found = {}
        for split in folders.SPLITS:
            dataset = data.open_split(config, split)
            found[split] = rows = []
            for index in range(len(dataset)):
                sample = dataset.sample(index, None)
                dataset.collate([sample])
                pair = dataset.source_text(index), dataset.target_text(index)
                texts = tokenizer.decode(sample["source"]), tokenizer.decode(sample["targets"][:-1])
                if texts != pair:
                    return f"{split}: {pair} is learned as {texts}"
                rows.append(pair)
        for split, (wanted, here) in _matched(self.splits, found).items():
            missing, more = Counter(wanted) - Counter(here), Counter(here) - Counter(wanted)
            if missing or more:
                return f"{split}: without {_few(missing)}, with {_few(more)}"
        return ""


@dataclass(frozen=True)
class Boxed:
    """(pixels (H, W), boxes) of each split; a box is (class, left, top, right, bottom, crowd)."""

    splits: dict[str, list[tuple[bytes, list[tuple[Any, ...]]]]]

    def difference(self, config: DataConfig, facts: DataFacts) -> str:
        """Say how what is read differs; empty where it does not."""
        found: dict[str, list[Any]] = {}
        for split in folders.SPLITS:
            dataset = data.open_split(config, split)
            dataset.collate([dataset.sample(i, 7) for i in range(len(dataset))])
            found[split] = rows = []
            for index in range(len(dataset)):
                boxes, fit = dataset.truth(index), dataset.letterbox(index)
                pixels_HW = dataset.picture(index, None)[0][:, :, 0]
                (left, top), (width, height) = fit.shift.astype(int), fit.inner
                pixels_HW = pixels_HW[top : top + height, left : left + width]
                columns = boxes.classes_N, boxes.corners_N4, boxes.crowd_N
                rows.append(
                    (
                        pixels_HW.tobytes(),
                        sorted(
                            (
                                facts.class_names[c],
                                *(round(float(x), 2) for x in corners),
                                bool(crowd),
                            )
                            for c, corners, crowd in zip(*columns, strict=True)
                        ),
                    )
                )
        for split, (wanted, here) in _matched(self.splits, found).items():
            ours, theirs = dict(here), dict(wanted)
            if ours.keys() != theirs.keys() or len(here) != len(wanted):
                return f"{split}: {len(here)} pictures, not {len(wanted)}, or others"
            for pixels, boxes in wanted:
                if ours[pixels] != sorted(boxes):
                    return f"{split}: boxes {ours[pixels]}, not {sorted(boxes)}"
        return ""


def _matched(wanted: dict[str, list[Any]], found: dict[str, list[Any]]) -> dict[str, Any]:
    """What is wanted and found of each split; one that was cut from train counts to it."""
    here = {split: list(found[split]) for split in wanted}
    for split in found.keys() - wanted.keys():
        here["train"] += found[split]
    return {split: (wanted[split], here[split]) for split in wanted}


@dataclass(frozen=True)
class Verdict:
    """What came of a case."""

    result: str
    detail: str = ""
    seconds: float = 0.0


class _Hang(BaseException):
    pass


def judge(case: Case, folder: Path) -> Verdict:
    """Write a case into a folder, read it, and compare; the folder is emptied first."""
    config = case.draft.write(emptied(folder))
    started = time.monotonic()
    try:
        with _limited(), _patched(case.draft.patches), _listening() as words:
            result, detail = _read(case, config, folder, words)
    except _Hang:
        result, detail = HANG, traceback.format_exc(limit=-4)
    except UserError as error:
        result, detail = REFUSED, str(error)
        if flaw := _flaw(detail, folder):
            result, detail = TRACEBACK, f"{flaw}: {detail}"
        elif case.draft.readable:
            result = NEEDLESS
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception
        result, detail = TRACEBACK, "".join(traceback.format_exception(error, limit=-6))
    seconds = time.monotonic() - started
    return Verdict(HANG if seconds > LIMIT_SECONDS else result, detail, seconds)


def _read(case: Case, config: DataConfig, folder: Path, words: list[str]) -> tuple[str, str]:
    facts = data.prepare_data(config)
    words += [*facts.left_out, *facts.left_out.values(), *facts.notes]
    words += [reason for split in facts.splits.values() for reason in split.left_out]
    (folder / "run").mkdir()
    write_record(folder / "run", facts)
    if read_record(folder / "run") != facts:
        return SILENT, "data.json does not hold the facts"
    if data.prepare_data(config) != facts:
        return SILENT, "prepared again, the facts are others"
    difference = case.draft.clean.difference(config, facts)
    if not difference:
        return EQUAL, ""
    if words and case.draft.may_differ:
        return SAID, f"{difference}; said: {words}"
    return SILENT, f"{difference}; said: {words}\n{format_record(facts)}"


def _flaw(message: str, folder: Path) -> str:
    """What is wrong with the message of a refusal; empty = nothing."""
    lines = message.splitlines()
    if not 1 <= len(lines) <= 6 or max(map(len, lines)) > 900:
        return "not one or a few lines"
    if "data." not in message and str(folder) not in message:
        return "names neither a key nor a file"
    if "Traceback" in message or re.search(r"object at 0x|<class |<built-in", message):
        return "a library's own words"
    return ""


@contextmanager
def _limited() -> Iterator[None]:
    def stop(signum: int, frame: Any) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    faulthandler.dump_traceback_later(4 * LIMIT_SECONDS, exit=True)  # deaf inside a library
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _patched(patches: dict[str, int]) -> Iterator[None]:
    """Read in small blocks, so that short texts have many borders."""
    before = {name: getattr(*PATCHED[name]) for name in patches}
    for name, value in patches.items():
        setattr(*PATCHED[name], value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(*PATCHED[name], value)


@contextmanager
def _listening() -> Iterator[list[str]]:
    """The warnings that are logged."""
    words: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            words.append(record.getMessage())

    logger, listener = logging.getLogger("trainer"), Listener(logging.WARNING)
    logger.addHandler(listener)
    propagated, logger.propagate = logger.propagate, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", RuntimeWarning)  # numbers that were not what they seem
            yield words
    finally:
        logger.propagate = propagated
        logger.removeHandler(listener)
