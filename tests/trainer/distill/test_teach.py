"""Precomputed teacher logits: written and read identically under every layout."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file

from conf.validation.teacher import answers_problems
from launch.cli.preflight import check_precompute, prepare_training
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig, world_size
from trainer import loop
from trainer.atomic_files import new_folder
from trainer.compress.distillation import recorded_teacher_logits
from trainer.config.loss import IGNORED
from trainer.config.train import (
    CompressConfig,
    DataConfig,
    EvalConfig,
    MetricsConfig,
    OptimConfig,
    TeachConfig,
    TrainConfig,
    UserError,
    classes_of,
)
from trainer.data import open_split
from trainer.data.loader import TrainLoader
from trainer.distill import precompute as teach
from trainer.distill.logit_dataset import DistillationDataset, RecordedLogits
from trainer.distill.precompute import teach_run, top_k_logits
from trainer.loss import divergence_sum
from trainer.nn.sequence import FullContext
from trainer.run.run_dir import load_config

ROOT = Path(__file__).parents[3]
# For each kind of data: the data, a teacher, and a student of another shape.
KINDS = {
    "text": (tiny.text_data, replace(tiny.GPT, vocab_size=280), {"layers": 1}),
    "images": (tiny.image_data, tiny.CLASSIFIER, {"layers": 1, "pool": "class_token"}),
    "pairs": (tiny.pairs_data, replace(tiny.TRANSLATOR, vocab_size=280), {"layers": 1}),
}
K = 5


def made(runtime: Runtime, folder: Path, kind: str) -> TrainConfig:
    data, model, _ = KINDS[kind]
    config = replace(data(folder / "data"), augment=False)
    return tiny.make_run(folder, runtime, model, config)


def asked(runtime: Runtime, config: TeachConfig) -> None:
    teach_run(check_precompute(config, runtime.world_size), runtime)


def trained(runtime: Runtime, config: TrainConfig) -> None:
    loop.train(config, runtime)


@pytest.fixture(scope="module", params=KINDS)
def teacher(ranks, tmp_path_factory, request) -> TrainConfig:
    """A run for each kind of data, with one checkpoint."""
    return ranks.run(1, made, tmp_path_factory.mktemp(request.param), request.param)[0]


def keep(ranks, teacher: TrainConfig, name: str, k: int = K, **degrees) -> Path:
    to = Path(teacher.run_dir).with_name(name)
    if not to.exists():
        config = TeachConfig(
            teacher.run_dir,
            str(to),
            k,
            StrategyConfig(**degrees),
            precision="fp64",
            device="cpu",
            micro_batch_size=3,
        )
        ranks.run(world_size(config.strategy), asked, config)
    return to


def student(teacher: TrainConfig, folder: Path, name: str, **changes) -> TrainConfig:
    """Return a run of four steps, distilled from recorded logits or from a run."""
    kind = teacher.data.kind
    config = TrainConfig(
        data=teacher.data,
        model=replace(teacher.model, **KINDS[kind][2]),
        precision="fp64",
        device="cpu",
        batch_size=4,
        steps=4,
        compress=CompressConfig(teacher=str(folder)),
        optim=OptimConfig(lr=1e-2),
        eval=EvalConfig(every=0, samples=4, test=False),
        metrics=MetricsConfig(every=1, sample_tokens=0),
        run_dir=str(Path(teacher.run_dir).with_name(name)),
        micro_batch_size=1,
    )
    return replace(config, **changes)


def losses(ranks, config: TrainConfig) -> list[float]:
    world = world_size(config.strategy)
    ranks.run(world, trained, prepare_training(config, world), timeout_seconds=300.0)
    text = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, text) if "loss" in line]


def said(runtime: Runtime, teacher: TrainConfig, folder: Path) -> list:
    """Return the teacher's logits, the recorded ones and the targets of two steps."""
    config = prepare_training(student(teacher, Path(teacher.run_dir), "live"), 1)
    model = loop.start_run(config, runtime).compression.teacher
    dataset = DistillationDataset(open_split(config.data, "train"), RecordedLogits(folder))
    loader = TrainLoader(dataset, 3, 4, 2, 0, 1, first_step=0)
    batches = [batch for _ in range(2) for batch in next(loader)]
    loader.close()
    classes = model.head.output.weight.shape[0]
    with torch.no_grad():
        return [
            (model(b), recorded_teacher_logits(b, classes, FullContext()), b["targets"])
            for b in batches
        ]


def test_recorded_logits_are_the_teachers(ranks, teacher):
    folder = keep(ranks, teacher, "answers")
    for logits, kept, targets in ranks.run(1, said, teacher, folder)[0]:
        logits, kept = (x[targets != IGNORED] for x in (logits, kept))
        values, classes = logits.topk(K, dim=-1)
        assert (kept > -torch.inf).sum(-1).eq(K).all()
        due = values - values[..., :1]
        torch.testing.assert_close(kept.gather(-1, classes).double(), due, rtol=1e-3, atol=1e-5)


def test_every_layout_records_the_same_logits(ranks, teacher):
    axis = {"text": "tensor", "images": "replicate", "pairs": "pipeline"}[teacher.data.kind]
    ours, theirs = (keep(ranks, teacher, "answers"), keep(ranks, teacher, axis, **{axis: 2}))
    one, two = (load_file(folder / "answers-00000.safetensors") for folder in (ours, theirs))
    assert one.keys() == two.keys() and len(one["starts"]) == 1 + len(
        open_split(teacher.data, "train")
    )
    for name, tensor in one.items():
        assert np.allclose(tensor.astype(float), two[name].astype(float), atol=2e-3), name
    assert RecordedLogits(ours).facts == replace(
        RecordedLogits(theirs).facts, files=RecordedLogits(ours).facts.files
    )


# Layouts of start and resume: vocabulary shards, then sequence shards.
LAYOUTS = {"text": ("tensor", "context"), "images": ("shard", "tensor")}
LAYOUTS["pairs"] = ("pipeline", "replicate")


def test_recorded_logits_train_identically_under_every_layout_and_on_resume(ranks, teacher):
    folder = keep(ranks, teacher, "answers")
    optim = OptimConfig(lr=1e-2, schedule="constant")
    one = losses(ranks, student(teacher, folder, "one", optim=optim))
    begun, gone_on = (StrategyConfig(**{axis: 2}) for axis in LAYOUTS[teacher.data.kind])
    half = student(teacher, folder, "two", optim=optim, strategy=begun, steps=2)
    first = losses(ranks, half)
    two = losses(ranks, replace(half, strategy=gone_on, steps=4))
    assert two[:2] == first
    assert two == pytest.approx(one, rel=1e-10)


def test_recorded_logits_of_all_classes_equal_a_live_teacher(ranks, teacher):
    if teacher.data.kind == "text":  # a live teacher gets other windows in each epoch
        return
    folder = keep(ranks, teacher, "all", k=classes_of(teacher.model))
    live = losses(ranks, student(teacher, Path(teacher.run_dir), "with-teacher", steps=2))
    kept = losses(ranks, student(teacher, folder, "with-answers", steps=2))
    assert kept == pytest.approx(live, rel=1e-3)
    alone = student(teacher, folder, "alone", steps=2, compress=CompressConfig())
    assert abs(losses(ranks, alone)[0] - kept[0]) > 0.02


def test_top_k_logits_are_recorded_with_their_classes():
    logits = torch.tensor([[[1.0, 3.0, -1e9, 2.0], [0.0, 0.0, 9.0, 8.5]], [[5.0, 1, 2, 3]] * 2])
    targets = torch.tensor([[1, IGNORED], [0, 2]])
    first, second = top_k_logits(logits, targets, k=3)
    assert first[0].tolist() == [[0.0, -1.0, -2.0]] and first[1].tolist() == [[1, 3, 0]]
    assert second[0].tolist() == [[0.0, -2.0, -3.0]] * 2 and second[1].dtype == np.uint16
    assert top_k_logits(logits, targets, k=4)[0][0].min() == np.finfo(np.float16).min
    wide = torch.zeros(1, 70_000).index_fill(1, torch.tensor([69_999]), 1.0)
    assert top_k_logits(wide, torch.tensor([0]), k=1)[0][1].tolist() == [[69_999]]


def test_classes_that_were_not_recorded_have_zero_probability():
    inputs = {
        "answer_logits": torch.tensor([[[0.0, -1.0]], [[0.0, 0.0]]]).half(),
        "answer_classes": torch.tensor([[[4, 1]], [[0, 0]]], dtype=torch.int32),
    }
    dense = recorded_teacher_logits(inputs, 5, FullContext())
    assert dense[0, 0].tolist() == [-torch.inf, -1.0, -torch.inf, -torch.inf, 0.0]
    targets = torch.tensor([[4], [IGNORED]])
    student = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    found = divergence_sum(student, dense, targets, 2.0)
    found.backward()
    likely = torch.tensor([0.0, -0.5]).double().softmax(0)
    due = (likely * (likely.log() - (student[0, 0] / 2).log_softmax(0)[[4, 1]])).sum()
    torch.testing.assert_close(found, due)
    assert student.grad.isfinite().all() and not student.grad[1].any()


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory) -> Path:
    """Teacher logits for text, and the run that they are from."""
    config = ranks.run(1, made, tmp_path_factory.mktemp("refused"), "text")[0]
    return keep(ranks, config, "answers")


def config_of(folder: Path, name: str) -> TrainConfig:
    teacher = load_config(folder.with_name("run"))
    return student(teacher, folder, name)


def test_recorded_logits_of_other_data_are_one_message(folder, tmp_path):
    here = replace(config_of(folder, "run"), run_dir=str(tmp_path / "run"))
    short = replace(here, data=replace(here.data, seq_len=9))
    assert "about data.seq_len=16, but data.seq_len=9 here; set data.seq_len=16" in tiny.no_teacher(
        short
    )
    more = replace(here, model=replace(here.model, vocab_size=288))
    assert "tells 280 classes apart, but there are 288 here" in tiny.no_teacher(more)
    match = replace(here, compress=replace(here.compress, match=[[0, 1]]))
    assert "learns from hidden states; set compress.match=[], or name the run" in tiny.no_teacher(
        match
    )
    chars = replace(here, data=replace(here.data, vocab_size=270))
    assert (
        f"has another tokenizer than the data here; set data.tokenizer={folder}"
        in tiny.no_teacher(chars)
    )
    shutil.copytree(here.data.path, tmp_path / "data")
    with (tmp_path / "data" / "train.txt").open("a") as file:
        file.write(" abc" * 40)
    own = str(folder / "tokenizer.json")
    other = replace(here, data=replace(here.data, path=str(tmp_path / "data"), tokenizer=own))
    assert f"about other samples than those of data.path={tmp_path}/data" in tiny.no_teacher(other)
    pairs = replace(
        here,
        data=tiny.pairs_data(tmp_path / "pairs"),
        model=replace(tiny.TRANSLATOR, vocab_size=280),
    )
    assert "about data.kind=text, but data.kind=pairs here" in tiny.no_teacher(pairs)


def test_augmented_images_are_rejected_with_recorded_logits(folder):
    facts = replace(RecordedLogits(folder).facts, kind="images", classes=7)
    compress = CompressConfig(teacher="answers")
    config = TrainConfig(
        data=DataConfig("images"), compress=compress, model=replace(tiny.CLASSIFIER, classes=7)
    )
    (message,) = answers_problems(config, facts)
    assert "data.augment=true moves them; set data.augment=false" in message
    config.data.augment = False
    assert answers_problems(config, facts) == []


def test_damaged_logits_are_one_message(folder, tmp_path):
    here = replace(config_of(folder, "run"), run_dir=str(tmp_path / "run"))
    damaged = tmp_path / "damaged"
    here = replace(here, compress=replace(here.compress, teacher=str(damaged)))
    file = damaged / "answers-00000.safetensors"
    again = "precompute the teacher logits again: launch/teach.py"

    def anew() -> None:
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(folder, damaged)

    anew()
    file.write_bytes(file.read_bytes()[:-1])
    assert "is damaged (answers-00000.safetensors does not have " in tiny.no_teacher(here)
    file.unlink()
    assert tiny.no_teacher(here).endswith(again)
    (damaged / "answers.json").write_text("{")
    assert tiny.no_teacher(here).endswith(again)
    anew()
    tensors = load_file(file)
    tensors["classes"][3, 0] = 280
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"is damaged .sample 0 has a non-finite logit or "):
        RecordedLogits(damaged).sample_logits(0)
    answers = RecordedLogits(damaged)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"is damaged .answers-00000.safetensors ends before"):
        answers.sample_logits(1)


def test_invalid_precompute_settings_are_one_message(folder):
    run = str(folder.with_name("run"))
    with pytest.raises(UserError, match=r"k=281 is more than the 280 classes .*; set k=280"):
        check_precompute(TeachConfig(run, "new", k=281), 1)
    with pytest.raises(UserError, match=rf"is there already; .* output_dir={run}-answers$"):
        check_precompute(TeachConfig(run, str(folder)), 1)
    shutil.copytree(folder, f"{run}-answers")
    with pytest.raises(UserError, match=rf"output_dir is empty; .* output_dir={run}-answers-2$"):
        check_precompute(TeachConfig(run), 1)


def test_a_folder_is_complete_or_absent(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(teach, "FILE_BYTES", 1)  # one file per sample
    new = tmp_path / "new"
    for fails in (True, False):
        with suppress(KeyboardInterrupt), new_folder(new) as partial:
            writer = teach.LogitWriter(partial)
            writer.add((np.zeros((2, 3), np.float16), np.arange(6, dtype=np.uint16).reshape(2, 3)))
            writer.add((np.zeros((1, 3), np.float16), np.full((1, 3), 7, np.uint16)))
            assert not new.exists()
            if fails:
                raise KeyboardInterrupt
            facts = replace(
                RecordedLogits(folder).facts, files=tuple(writer.flush()), samples=2, k=3
            )
            writer.finish_folder(facts, tmp_path / "none")
        if fails:
            assert not list(tmp_path.iterdir())
    answers = RecordedLogits(new)
    assert len(facts.files) == 2
    assert answers.sample_logits(0)[1].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert answers.sample_logits(1)[1].tolist() == [[7, 7, 7]]


def test_the_precompute_command(folder, tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "teach.py"), "device=cpu"]
    command += [f"run_dir={folder.with_name('run')}", f"output_dir={tmp_path / 'kept'}", f"k={K}"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    count = RecordedLogits(folder).facts.samples
    assert f"teacher logits: {tmp_path / 'kept'}, {count} samples, " in done.stdout
    assert replace(RecordedLogits(tmp_path / "kept").facts, files=()) == replace(
        RecordedLogits(folder).facts, files=()
    )
