"""A run's folder holds all that inference needs, and every command reads it from that folder."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from launch.cli.preflight import prepare_training
from parallel.runtime import JobQueue, process_group
from trainer import data
from trainer.config.train import (
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ModelConfig,
    OtherDataConfig,
    TrainConfig,
    UserError,
)
from trainer.data.record import TOKENIZER, data_of, read_record
from trainer.data.tokenizer import Tokenizer
from trainer.inference.trained_run import export_run
from trainer.loop import start_run
from trainer.run.run_dir import load_config
from trainer.tasks.evaluate import evaluate_run
from trainer.tasks.generate import print_generation

PLAY = Path(__file__).parents[3] / "trainer/data/bundled/shakespeare/valid.txt"
COLOURS = {"ape": (200, 10, 10), "bee": (10, 200, 10), "cat": (10, 10, 200)}


@pytest.fixture(scope="module")
def runtime():
    with process_group("cpu", JobQueue.single_process()) as alone:
        yield alone


@pytest.fixture
def text_run(tmp_path, runtime) -> TrainConfig:
    path = tmp_path / "book.txt"
    path.write_text(PLAY.read_text()[:20_000])
    reads = DataConfig(path=str(path), vocab_size=300, seq_len=16, cache=str(tmp_path / "cache"))
    model = ModelConfig(layers=1, width=16, heads=2, ffn_width=16, init_std=0.5)
    return tiny.make_run(tmp_path, runtime, model, reads)


def paint(folder: Path, names=tuple(COLOURS), count: int = 6) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        for split, n in (("train", count), ("valid", 2), ("test", 2)):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                pixels = np.clip(np.array(COLOURS[name]) + rng.integers(0, 40, (8, 8, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")


@pytest.fixture
def image_run(tmp_path, runtime) -> TrainConfig:
    paint(tmp_path / "zoo")
    reads = DataConfig(
        kind="images", path=str(tmp_path / "zoo"), cache=str(tmp_path / "cache"), augment=False
    )
    return tiny.make_run(tmp_path, runtime, tiny.CLASSIFIER, reads)


def loss_of(config: TrainConfig, runtime, capsys, **changes) -> float:
    evaluate_run(EvaluateConfig(config.run_dir, precision="fp64", device="cpu", **changes), runtime)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│"))
    return float(row.split("│")[1])


def guess(config: TrainConfig, prompt: str, runtime, capsys) -> str:
    reader = GenerateConfig(config.run_dir, prompt, precision="fp64", device="cpu")
    print_generation(reader, runtime)
    return capsys.readouterr().out.split("┡")[1]


# ---- kind 4: a run keeps its tokenizer and classes, whatever its data path holds now


def test_evaluation_keeps_the_tokenizer_and_warns_of_another_text(
    text_run, runtime, capsys, caplog
):
    before = loss_of(text_run, runtime, capsys)
    assert caplog.text == ""
    book = Path(text_run.data.path)
    book.write_text("zzz qqq xxx\n" * 300 + book.read_text())
    folders = set(Path(text_run.data.cache).iterdir())
    after = loss_of(text_run, runtime, capsys)
    new = {path.name for path in set(Path(text_run.data.cache).iterdir()) - folders}
    assert len(new) == 1 and "-tokenizer-" not in new.pop()  # tokens, but no other tokenizer
    assert "the test split at data.path=" in caplog.text and "training run" in caplog.text
    assert after == pytest.approx(before, rel=0.1)  # the same tokens, nearly the same text


def test_a_run_finds_the_tokens_that_were_prepared_when_it_began(text_run, runtime, capsys):
    folders = set(Path(text_run.data.cache).iterdir())
    loss_of(text_run, runtime, capsys)
    assert set(Path(text_run.data.cache).iterdir()) == folders


def test_other_data_are_evaluated_when_they_are_named(text_run, tmp_path, runtime, capsys, caplog):
    same = loss_of(text_run, runtime, capsys)
    other = tmp_path / "elsewhere" / "book.txt"
    other.parent.mkdir()
    shutil.copy(text_run.data.path, other)
    Path(text_run.data.path).unlink()
    moved = loss_of(text_run, runtime, capsys, data=OtherDataConfig(str(other)))
    assert moved == same and caplog.text == ""


def test_an_image_run_needs_no_data_to_name_a_class(image_run, tmp_path, runtime, capsys):
    shutil.copy(tmp_path / "zoo/test/cat/0.png", tmp_path / "cat.png")
    before = guess(image_run, str(tmp_path / "cat.png"), runtime, capsys)
    (tmp_path / "zoo/train/ape").rename(tmp_path / "zoo/train/zebra")  # another order of classes
    paint(tmp_path / "zoo", ("bee",), count=9)
    assert guess(image_run, str(tmp_path / "cat.png"), runtime, capsys) == before
    shutil.rmtree(tmp_path / "zoo")
    shutil.rmtree(image_run.data.cache)
    assert guess(image_run, str(tmp_path / "cat.png"), runtime, capsys) == before


def test_classes_that_a_run_lacks_are_rejected(image_run, tmp_path, runtime, capsys):
    for split in ("train", "valid", "test"):
        (tmp_path / "zoo" / split / "ape").rename(tmp_path / "zoo" / split / "yak")
    with pytest.raises(UserError, match=r"yak.*ape, bee, cat"):
        loss_of(image_run, runtime, capsys)


def test_a_missing_class_does_not_renumber_the_others(image_run, tmp_path, runtime, capsys):
    shutil.rmtree(tmp_path / "zoo")
    paint(tmp_path / "zoo", ("bee", "cat"))
    reads = data_of(image_run)
    facts = data.prepare_data(reads)
    assert facts.class_names == ("ape", "bee", "cat")
    labels = {int(data.open_split(reads, "test").sample(i, None)["targets"]) for i in range(4)}
    assert labels == {1, 2}
    record = read_record(image_run.run_dir)
    assert (facts.mean, facts.std) == (record.mean, record.std)


def test_an_export_is_used_without_run_and_data(image_run, tmp_path, runtime, capsys):
    shutil.copy(tmp_path / "zoo/test/cat/0.png", tmp_path / "cat.png")
    before = guess(image_run, str(tmp_path / "cat.png"), runtime, capsys)
    export_run(ExportConfig(image_run.run_dir, str(tmp_path / "small")), runtime)
    capsys.readouterr()
    shutil.rmtree(image_run.run_dir)
    shutil.rmtree(tmp_path / "zoo")
    exported = replace(image_run, run_dir=str(tmp_path / "small"))
    assert guess(exported, str(tmp_path / "cat.png"), runtime, capsys) == before


def test_paths_in_a_config_hold_in_any_folder(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text(PLAY.read_text()[:20_000])
    monkeypatch.chdir(tmp_path)
    reads = DataConfig(path="book.txt", vocab_size=300, seq_len=16, cache="cache")
    model = ModelConfig(layers=1, width=16, heads=2, ffn_width=16)
    config = TrainConfig(model=model, data=reads, run_dir="run")
    prepare_training(config, 1)
    assert load_config("run").data.path == str(tmp_path / "book.txt")
    prepare_training(config, 1)  # and the same command resumes it


def test_a_damaged_record_is_named(image_run):
    path = Path(image_run.run_dir) / "data.json"
    for text in ("", "[]", '{"class_names": 5}', "{"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"data\.json is damaged"):
            read_record(image_run.run_dir)


def test_the_record_of_the_data_is_in_the_run_folder(text_run):
    table = (Path(text_run.run_dir) / "data.txt").read_text()
    assert re.search(r"train +book\.txt \(0 % to 90\.?\d* %\)", table)
    assert re.search(r"test +book\.txt \(95\.?\d* % to 100 %\)", table)
    record = read_record(text_run.run_dir)
    assert record.splits["train"].tokens > 5000 and f"{record.splits['train'].tokens:,}" in table


# ---- kind 5: weights for another vocabulary or other classes


def weights(config: TrainConfig, runtime) -> dict[str, Tensor]:
    parameters = start_run(prepare_training(config, 1), runtime).worker.parameters()
    return {name: tensor.detach().clone() for name, tensor in parameters.items()}


def begun_from(config: TrainConfig, folder: Path, **changes) -> TrainConfig:
    return replace(config, init_from=config.run_dir, run_dir=str(folder / "second"), **changes)


def test_another_text_is_read_with_the_tokenizer_of_the_weights(text_run, tmp_path, runtime):
    other = tmp_path / "other.txt"
    other.write_text(PLAY.read_text()[40_000:60_000])
    config = begun_from(text_run, tmp_path, data=replace(text_run.data, path=str(other)))
    prepare_training(config, 1)
    assert Tokenizer.load(tmp_path / "second" / TOKENIZER).is_same_file(
        Path(text_run.run_dir) / TOKENIZER
    )


@pytest.mark.parametrize("by", ["data.tokenizer", "data.processor", "export"])
def test_another_tokenizer_that_is_named_takes_rows_by_token(
    text_run, tmp_path, runtime, caplog, by
):
    own = Tokenizer.train([PLAY.read_text()[40_000:60_000]], 320)
    own.save(tmp_path / "own.json")
    reads = replace(text_run.data, tokenizer=str(tmp_path / "own.json"))
    if by == "data.processor":
        (tmp_path / "other.txt").write_text(PLAY.read_text()[40_000:60_000])
        path = str(tmp_path / "other.txt")
        reads = replace(text_run.data, path=path, vocab_size=320, processor="new")
    config = begun_from(text_run, tmp_path, data=reads)
    if by == "export":
        export_run(ExportConfig(text_run.run_dir, str(tmp_path / "small")), runtime)
        config = replace(config, init_from=str(tmp_path / "small"))
    config = replace(config, model=replace(config.model, vocab_size=0))
    here = weights(config, runtime)["embed.tokens.weight"]
    drawn = weights(replace(config, init_from="", run_dir=str(tmp_path / "third")), runtime)
    there = weights(text_run, runtime)["embed.tokens.weight"]
    rows = Tokenizer.load(tmp_path / "second" / TOKENIZER).token_ids()
    theirs = Tokenizer.load(Path(text_run.run_dir) / TOKENIZER).token_ids()
    assert 258 <= len(theirs.keys() & rows.keys()) < len(rows)
    for token, row in rows.items():
        expected = there[theirs[token]] if token in theirs else drawn["embed.tokens.weight"][row]
        assert torch.allclose(here[row], expected, atol=1e-6), token
    assert f"of {len(rows)} here: their rows are taken over" in caplog.text


def test_other_classes_are_refused_or_taken_by_name(image_run, tmp_path, runtime, caplog):
    there = weights(image_run, runtime)
    for split in ("train", "valid", "test"):
        (tmp_path / "zoo" / split / "ape").rename(tmp_path / "zoo" / split / "yak")
    config = begun_from(image_run, tmp_path, model=replace(image_run.model, classes=0))
    with pytest.raises(UserError, match=r"yak.*data\.processor=new"):
        prepare_training(config, 1)
    config = replace(config, data=replace(config.data, processor="new"))
    here = weights(config, runtime)
    # bee and cat were rows 1 and 2 and are now 0 and 1; yak is initialised.
    for name in ("head.output.weight", "head.output.bias"):
        assert torch.equal(here[name][:2], there[name][1:])
    assert not torch.equal(here["head.output.weight"][2], there["head.output.weight"][0])
    assert "has classes for 2 of 3 here" in caplog.text


@pytest.mark.parametrize(
    "key, value",
    [("norm_eps", 1.0), ("rope_theta", 100.0), ("rope_scaling", 8.0), ("sliding_window", 4)],
)
def test_keys_that_change_the_function_are_named(text_run, tmp_path, caplog, key, value):
    prepare_training(
        begun_from(text_run, tmp_path, model=replace(text_run.model, **{key: value})), 1
    )
    assert f"model.{key}=" in caplog.text and "another function" in caplog.text


# ---- kind 11: following the advice of a message does not damage a run


def test_the_tokenizer_of_a_run_stays_when_its_text_changes(text_run, tmp_path, runtime):
    kept = (Path(text_run.run_dir) / TOKENIZER).read_bytes()
    (tmp_path / "other.txt").write_text(PLAY.read_text()[40_000:60_000])
    path = replace(text_run.data, path=str(tmp_path / "other.txt"))
    longer = replace(text_run, steps=5, data=path)
    with pytest.raises(UserError, match=r"resume_changed=\[data\.path\]"):
        prepare_training(longer, 1)
    for changed in (["data"], ["data.path"]):
        prepare_training(replace(longer, resume_changed=changed), 1)
        assert (Path(text_run.run_dir) / TOKENIZER).read_bytes() == kept
    assert read_record(text_run.run_dir).path == str(tmp_path / "other.txt")


@pytest.mark.parametrize("key, value", [("tokenizer", "own.json"), ("vocab_size", 320)])
def test_a_run_never_changes_its_tokenizer(text_run, tmp_path, key, value):
    Tokenizer.train([PLAY.read_text()], 320).save(tmp_path / "own.json")
    value = str(tmp_path / value) if key == "tokenizer" else value
    reads = replace(text_run.data, **{key: value})
    with pytest.raises(UserError, match=rf"data\.{key}=.*init_from={text_run.run_dir}"):
        prepare_training(replace(text_run, data=reads, resume_changed=["data"], steps=5), 1)


def test_a_teacher_needs_the_tokenizer_and_classes_of_the_student(image_run, tmp_path):
    teacher = json.loads((Path(image_run.run_dir) / "data.json").read_text())
    teacher["class_names"] = teacher["class_names"][::-1]
    (Path(image_run.run_dir) / "data.json").write_text(json.dumps(teacher))
    compress = replace(image_run.compress, teacher=image_run.run_dir)
    student = replace(image_run, compress=compress, run_dir=str(tmp_path / "student"))
    with pytest.raises(UserError, match=r"other classes.*set data\.processor="):
        prepare_training(student, 1)
