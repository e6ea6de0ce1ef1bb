"""A short run of the file fuzzer (tests/fuzz/files.py); its judge detects faults."""

import time

import files
import judge
import pytest

from trainer.data.folders import SPLITS
from trainer.data.pictures import pixels_of


def test_odd_files_are_read_correctly_or_rejected_or_reported(tmp_path):
    outcome = files.run(cases=6600, every=22, seed=14, folder=tmp_path)
    assert not outcome.faults, "\n".join(f"{c.name}: {v.detail}" for c, v in outcome.faults)
    for kind, counts in outcome.counts.items():
        assert counts[judge.EQUAL] >= 5 and counts[judge.REFUSED] >= 5, (kind, counts)
        assert len(outcome.digests[kind]) >= 45, "each is another input"


def test_a_case_is_a_function_of_its_number_and_seed():
    for make, _ in files.KINDS.values():
        cases, again, others = ([make(n, seed) for n in range(900, 905)] for seed in (4, 4, 5))
        assert [c.name for c in cases] == [c.name for c in again]
        digests, same, other = ([c.draft.digest() for c in x] for x in (cases, again, others))
        assert digests == same and not set(digests) & set(other)


def inverted(image, channels):
    return 255 - pixels_of(image, channels)


def failing(*args):
    raise KeyError("traceback")


def unmarked(part):
    """Read text without removing its byte order mark."""
    yield part.path.read_bytes()[part.start : part.end].decode()


BROKEN = {
    "PNG, all": ("pictures", "trainer.data.image_files.pictures.pixels_of", inverted, judge.SILENT),
    "splits spelled": (
        "pictures",
        "trainer.data.folders.SPELLINGS",
        {s: {f"no-{s}"} for s in SPLITS},
        judge.NEEDLESS,
    ),
    "int64": ("archives", "trainer.data.archive._class_labels", failing, judge.TRACEBACK),
    "UTF-8 with a mark": ("texts", "trainer.data.text.read_text", unmarked, judge.SILENT),
    "background": ("boxes", "trainer.data.pictures.pixels_of", inverted, judge.SILENT),
    "WordLevel": (
        "tokenizers",
        "trainer.data.tokenized.characters_lost",
        lambda a, b: 0,
        judge.SILENT,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_judge_detects_planted_faults(tmp_path, monkeypatch, name):
    kind, place, broken, expected = BROKEN[name]
    cases = (files.KINDS[kind][0](number, 14) for number in range(150))
    case = next(case for case in cases if case.name.partition(" ")[2] == name)
    assert judge.judge(case, tmp_path / "case").result in (judge.EQUAL, judge.SAID)
    monkeypatch.setattr(place, broken)
    assert judge.judge(case, tmp_path / "case").result == expected


def test_a_hang_ends_and_is_named(tmp_path, monkeypatch):
    def endless(*args):
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(judge, "LIMIT_SECONDS", 2.0)
    monkeypatch.setattr("trainer.data.archive._class_labels", endless)
    verdict = judge.judge(files.KINDS["archives"][0](0, 0), tmp_path / "case")
    assert verdict.result == judge.HANG and "endless" in verdict.detail
