"""Data preparation: once, atomically, again after a change; and Hugging Face data sets."""

import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from trainer import data
from trainer.config.train import DataConfig, UserError
from trainer.data import cache as prepared
from trainer.data import huggingface as hub
from trainer.data.files import BUNDLED, locate_data, split_parts
from trainer.data.pairs import SUFFIXES, read_pairs

TEXT = "To-morrow, and to-morrow, and to-morrow,\nCreeps in this petty pace from day to day\n" * 20


@pytest.fixture
def config(tmp_path):
    (tmp_path / "play.txt").write_text(TEXT)
    return DataConfig(
        path=str(tmp_path / "play.txt"),
        seq_len=16,
        vocab_size=280,
        cache=str(tmp_path / "cache"),
    )


def state(config):
    """Return the name and modification time of every file in the cache."""
    files = (path for path in Path(config.cache).rglob("*") if path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_preparing_again_writes_nothing(config):
    facts = data.prepare_data(config)
    before = state(config)
    assert data.prepare_data(config) == facts and state(config) == before
    config.seq_len = 8  # windows are cut when they are read
    assert data.prepare_data(config).sample_counts["train"] > facts.sample_counts["train"]
    assert state(config) == before


CHANGES = {
    "vocab_size": lambda c: setattr(c, "vocab_size", 270),
    "separator": lambda c: setattr(c, "document_separator", "\n"),
    "held_out": lambda c: setattr(c, "held_out", 0.5),
    "content": lambda c: Path(c.path).write_text(TEXT.replace("pace", "trot")),
    "time": lambda c: os.utime(c.path, ns=(0, 0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_prepared_again(config, change):
    data.prepare_data(config)
    before = state(config)
    CHANGES[change](config)
    data.prepare_data(config)
    assert set(before) < set(state(config))
    train = data.open_split(config, "train")
    found = data.open_tokenizer(config).decode(train.sample(1, None)["tokens"])
    assert found in Path(config.path).read_text()


def test_a_damaged_folder_is_made_again(config, caplog):
    facts = data.prepare_data(config)
    file = next(Path(config.cache).glob("*/train.bin"))
    content = file.read_bytes()
    for damage in (lambda: file.write_bytes(content[:100]), file.unlink):
        damage()
        with pytest.raises(UserError, match=r"is (missing|damaged)"):
            data.open_split(config, "train")
        assert data.prepare_data(config) == facts
        assert file.read_bytes() == content
    cut, gone = caplog.messages
    assert f"train.bin is damaged: it has 100 bytes, not {len(content)}; it is prepared" in cut
    assert "train.bin is missing; it is prepared again" in gone


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"splits": {}}'])
def test_a_garbled_record_is_prepared_again(config, caplog, text):
    facts = data.prepare_data(config)
    record = next(Path(config.cache).glob("*/prepared.json"))
    record.write_text(text)
    assert data.prepare_data(config) == facts
    assert "prepared.json is damaged; it is prepared again" in caplog.text


def test_a_preparation_that_fails_leaves_nothing_behind(config, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.data.text._write_split", killed)
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data(config)
    (left,) = Path(config.cache).iterdir()  # the previous stage, which is complete
    assert "-tokenizer-" in left.name and prepared.find_damage(left) == ""


def test_the_first_of_several_builders_wins(tmp_path):
    """Build while another process finishes first."""
    folder = tmp_path / "cache" / "x"

    def write(text, meanwhile=lambda: None):
        def fill(temporary):
            (temporary / "data").write_text(text)
            meanwhile()
            return {}

        return fill

    prepared.build_folder(
        folder, write("slow", lambda: prepared.build_folder(folder, write("fast")))
    )
    assert (folder / "data").read_text() == "fast"
    assert [path.name for path in folder.parent.iterdir()] == ["x"]


def test_several_processes_at_once(config):
    with ProcessPoolExecutor(3, get_context("fork")) as pool:
        facts = list(pool.map(data.prepare_data, [config] * 3))
    assert facts[0] == facts[1] == facts[2]
    assert len(list(Path(config.cache).iterdir())) == 2  # the tokenizer and the tokens


def test_an_unwritable_cache_is_named(config, tmp_path):
    config.cache = str(tmp_path / "play.txt" / "cache")
    with pytest.raises(UserError, match=r"data\.cache=.* cannot be written"):
        data.prepare_data(config)


def test_token_ids_beyond_the_tokenizer_are_refused(config):
    data.prepare_data(config)
    record = next(Path(config.cache).glob("*/train.bin")).with_name("prepared.json")
    content = json.loads(record.read_text())
    content["splits"]["valid"]["largest_id"] = 280
    record.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"valid split .* token id 280 .* has 280 entries"):
        data.prepare_data(config)


def test_preparing_needs_no_torch():
    code = "import sys, trainer.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_bundled_data_are_there_and_readable():
    root = Path(data.__file__).parent / "bundled"
    assert all((root / path).exists() for _, path in BUNDLED.values())
    config = DataConfig(kind="pairs", path="bundled:home-assistant")
    parts = split_parts(config, locate_data(config), SUFFIXES)
    counts = {s: sum(1 for part in p for _ in read_pairs(part)) for s, p in parts.items()}
    assert counts == {"train": 16_954, "valid": 663, "test": 1053}


SETTINGS = [
    ({"kind": "image"}, r"data\.kind=image must be .*; set data\.kind=images"),
    ({"path": ""}, r"data\.path is empty; it must be .*bundled:shakespeare"),
    ({"path": "bundled:shakespear"}, r"set data\.path=bundled:shakespeare"),
    ({"path": "bundled:fashion-mnist"}, r"data\.kind=text: .* is data\.kind=images"),
    ({"path": "pyproject.tml"}, r"pyproject\.tml: no such file or folder"),
    ({"path": "x" * 300}, r"cannot be read: File name too long"),
    ({"path": "/".join(["long"] * 1000)}, r"cannot be read: File name too long"),
    ({"seq_len": 0}, r"data\.seq_len=0 must be at least 1"),
    ({"seq_len": 1, "kind": "pairs"}, r"data\.seq_len=1 must be at least 2"),
    ({"vocab_size": 100}, r"data\.vocab_size=100 must be at least 258"),
    ({"held_out": 1.0}, r"data\.held_out=1\.0 must be .*; set data\.held_out=0\.9"),
    ({"held_out": -1.0}, r"set data\.held_out=0\.001"),
    ({"tokenizer": "none.json"}, r"data\.tokenizer=none\.json: no such file"),
]


@pytest.mark.parametrize("settings, message", SETTINGS)
def test_settings_that_cannot_be(config, settings, message):
    for key, value in settings.items():
        setattr(config, key, value)
    with pytest.raises(UserError, match=message):
        data.prepare_data(config)


@pytest.mark.parametrize("method", ["open", "exists"])
def test_what_may_not_be_read_is_named(config, monkeypatch, method):
    """Root may read everything, so the system call is patched to raise PermissionError."""
    kept = getattr(Path, method)

    def refused(path, *args, **options):
        if path.name == "play.txt":
            raise PermissionError(13, "Permission denied")
        return kept(path, *args, **options)

    monkeypatch.setattr(Path, method, refused)
    with pytest.raises(UserError, match=r"data\.path.*play\.txt cannot be read: .*Permission"):
        data.prepare_data(config)


def test_all_problems_are_reported_at_once_with_the_nearest_name(config):
    config.path = config.path.replace("play", "plya")
    config.seq_len = config.vocab_size = 0
    with pytest.raises(UserError) as error:
        data.prepare_data(config)
    assert len(error.value.problems) == 3
    assert "play.txt?" in error.value.problems[-1]


def test_data_of_another_kind_are_named(config, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    config.path = str(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"data\.kind=text reads .*; set data\.kind=images"):
        data.prepare_data(config)
    config.path = str(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder holds no \.txt"):
        data.prepare_data(config)
    with pytest.raises(UserError, match=r"split=dev must be one of train, valid, test"):
        data.open_split(config, "dev")


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    """Return a function that saves rows as a local data set and returns its config."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")

    def write(kind, **splits):
        for split, rows in splits.items():
            file = tmp_path / "set" / f"{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DataConfig(
            kind=kind,
            path=f"hf:{tmp_path / 'set'}",
            seq_len=40,
            vocab_size=270,
            cache=str(tmp_path / "cache"),
        )

    return write


def test_hugging_face_text(hugging_face, monkeypatch):
    texts = [f"{TEXT[i:]} é" for i in range(9)]
    rows = [{"text": text, "id": i} for i, text in enumerate(texts)]
    config = hugging_face("text", train=rows, validation=rows[:2], test=rows[:1])
    facts = data.prepare_data(config)
    assert data.open_split(config, "valid").characters == len(texts[0] + texts[1])
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    assert data.prepare_data(config) == facts  # converted data no longer need `datasets`
    config.path += "x"
    with pytest.raises(UserError, match=r'pip install "samestep\[huggingface\]"'):
        data.prepare_data(config)


def test_hugging_face_pairs(hugging_face):
    rows = [{"translation": {"en": f"day\t{i}", "de": f"Tag {i}\n{TEXT[:60]}"}} for i in range(40)]
    config = hugging_face("pairs", train=rows, test=rows[:3])
    assert data.prepare_data(config).sample_counts == {"train": 37, "valid": 3, "test": 3}
    test = data.open_split(config, "test")
    assert (test.source_text(1), test.target_text(1)[:5]) == ("day 1", "Tag 1")
    config.fields = ["de", "en"]  # in this order
    data.prepare_data(config)
    assert data.open_split(config, "test").target_text(1) == "day 1"
    for fields in (["en"], ["en", "fr"], ["en", "de", "en"]):
        config.fields = fields
        with pytest.raises(UserError, match=r"columns translation\.en, .* set data\.fields to 2"):
            data.prepare_data(config)


def test_hugging_face_images(hugging_face, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
    rows = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(picture) for picture in pixels], "label": [0, 1, 0, 1, 0, 1]},
        datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        ),
    )
    config = hugging_face("images", train=[])
    (tmp_path / "set" / "train.jsonl").unlink()
    for split in ("train", "valid", "test"):
        rows.to_parquet(str(tmp_path / "set" / f"{split}.parquet"))
    facts = data.prepare_data(config)
    assert facts.class_names == ("cat", "dog") and facts.sample_counts["valid"] == 6
    test = data.open_split(config, "test")
    assert (test.sample(2, None)["images"][0] == pixels[2]).all()
    assert test.sample(3, None)["targets"] == 1
