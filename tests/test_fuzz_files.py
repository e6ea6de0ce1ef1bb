"""A short form of tests/fuzz/files.py: odd files are read right, with a word, or refused."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parent / "fuzz" / "files.py"


@pytest.fixture(scope="module")
def fuzz():
    """The fuzzer, which is a script."""
    spec = importlib.util.spec_from_file_location("fuzz_files", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def test_odd_files(fuzz, monkeypatch):
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    outcomes = fuzz.run(first=10_000, cases=180, seed=0)
    bad = [outcome for outcome in outcomes if outcome.verdict in fuzz.NEVER]
    assert bad == []
    for kind in ("pictures", "folders", "texts", "rows", "archives", "tokenizers"):
        verdicts = {outcome.verdict for outcome in outcomes if outcome.kind == kind}
        assert len(verdicts) > 1, kind  # some are read, and some are told of


def test_the_fuzzer_sees_a_silent_difference(fuzz, monkeypatch):
    """Were pictures not turned by EXIF, it would say so."""
    monkeypatch.setattr(fuzz, "CASES", [fuzz.picture_case])
    unturned = "trainer.data.pictures.ImageOps.exif_transpose"
    monkeypatch.setattr(unturned, lambda image, **options: image)
    outcomes = fuzz.run(first=22, cases=3, seed=1)
    assert any(outcome.verdict == "silent difference" for outcome in outcomes)
