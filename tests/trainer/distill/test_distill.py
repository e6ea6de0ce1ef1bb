"""Distillation: the divergence against torch's, and runs with a live teacher."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional as F

from conf.validation.compression import match_problems
from conf.validation.teacher import teacher_problems
from conf.validation.validate import find_problems
from launch.cli.preflight import prepare_training
from parallel.rank_pool import RankFailedError
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig, world_size
from trainer import loop
from trainer.checkpoint.folder import list_checkpoints
from trainer.compress.hidden_states import similarity_loss_sum
from trainer.compress_report.report import write_comparison
from trainer.config.loss import IGNORED
from trainer.config.train import (
    CompressConfig,
    CompressReportConfig,
    EvalConfig,
    EvaluateConfig,
    LossConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    UserError,
)
from trainer.inference.trained_run import load_trained_run
from trainer.loss import divergence_sum
from trainer.run.run_dir import AlreadyFinishedError

TEACHER = replace(tiny.GPT, vocab_size=280, tied=True)
STUDENT = replace(tiny.LLAMA, vocab_size=280, dropout=0.1)


@pytest.mark.parametrize("shape", [(3, 5, 11), (7, 11)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_equals_torchs(shape, temperature):
    draw = torch.Generator().manual_seed(0)
    ours, said = 3 * torch.randn(2, *shape, dtype=torch.float64, generator=draw)
    targets = torch.randint(0, 11, shape[:-1], generator=draw)
    targets.view(-1)[[1, 4]] = IGNORED
    theirs = ours.clone().requires_grad_()
    valid = targets != IGNORED
    due = sum(
        F.kl_div(
            (row / temperature).log_softmax(0), (answer / temperature).softmax(0), reduction="sum"
        )
        for row, answer in zip(theirs[valid], said[valid], strict=True)
    )
    found = divergence_sum(ours.requires_grad_(), said, targets, temperature)
    found.backward()
    due.backward()
    torch.testing.assert_close(found, due)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert divergence_sum(said, said, targets, temperature).item() == pytest.approx(0, abs=1e-12)


def test_half_precision_logits_are_cast_to_float32():
    said = torch.randn(4, 9).bfloat16()
    found = divergence_sum(said.half(), said, torch.zeros(4, dtype=torch.int64), 2.0)
    assert found.dtype == torch.float32


@pytest.fixture(scope="module")
def taught(ranks, tmp_path_factory) -> TrainConfig:
    """A run with a teacher that has one checkpoint."""
    folder = tmp_path_factory.mktemp("taught")
    data = tiny.text_data(folder / "data")
    teacher = ranks.run(1, made, folder, TEACHER, data)[0]
    return TrainConfig(
        data=data,
        model=STUDENT,
        precision="fp64",
        device="cpu",
        batch_size=4,
        steps=3,
        compress=CompressConfig(teacher=teacher.run_dir),
        optim=OptimConfig(lr=1e-2),
        eval=EvalConfig(every=0, samples=4, test=False),
        metrics=MetricsConfig(every=1, sample_tokens=0),
        run_dir=str(folder / "student"),
    )


def made(runtime: Runtime, folder: Path, model: ModelConfig, data) -> TrainConfig:
    return tiny.make_run(folder, runtime, model, data)


def trained(runtime: Runtime, config: TrainConfig) -> None:
    loop.train(config, runtime)


def losses(ranks, config: TrainConfig, name: str, **changes) -> list[float]:
    """Return the losses of a run's three steps."""
    config = replace(config, run_dir=f"{config.run_dir}-{name}", **changes)
    world = world_size(config.strategy)
    ranks.run(world, trained, prepare_training(config, world), timeout_seconds=300.0)
    text = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    found = [line["loss"] for line in map(json.loads, text) if "loss" in line]
    assert len(found) == 3
    return found


@pytest.mark.parametrize("axis", ["replicate", "shard", "tensor", "pipeline", "context"])
def test_distillation_is_identical_under_every_layout(ranks, taught, axis):
    one = losses(ranks, taught, f"one-{axis}")
    two = losses(ranks, taught, f"two-{axis}", strategy=StrategyConfig(**{axis: 2}))
    assert two == pytest.approx(one, rel=1e-10)
    alone = losses(ranks, taught, f"alone-{axis}", compress=CompressConfig())
    assert abs(one[0] - alone[0]) > 0.1


@pytest.fixture
def damaged(taught, tmp_path) -> TrainConfig:
    """A run whose teacher has one checkpoint, which is damaged."""
    folder = tmp_path / "teacher"
    shutil.copytree(taught.compress.teacher, folder)
    (file,) = folder.glob("checkpoints/*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    compress = replace(taught.compress, teacher=str(folder))
    return replace(taught, compress=compress, run_dir=str(tmp_path / "run"))


def test_a_teacher_with_zero_weight_is_not_loaded_and_changes_nothing(ranks, damaged):
    silent = replace(damaged.compress, distill_weight=0.0)
    found = losses(ranks, damaged, "silent", compress=silent)
    assert found == losses(ranks, damaged, "alone", compress=CompressConfig())


def test_a_damaged_teacher_is_rejected(ranks, damaged):
    message = f"compress.teacher={damaged.compress.teacher} holds no good checkpoint"
    with pytest.raises(RankFailedError, match=message):
        ranks.run(1, trained, prepare_training(damaged, 1))


def held(runtime: Runtime, config: TrainConfig) -> dict[str, torch.Tensor] | None:
    """Return the frozen teacher's weights, or None on a rank that needs no teacher."""
    state = loop.start_run(config, runtime)
    teacher = state.compression.teacher
    if teacher is None:
        return None
    assert teacher.dtype == torch.bfloat16
    assert not any(module.training for module in teacher.modules())
    assert teacher.head.output.weight is teacher.embed.tokens.weight
    found = dict(teacher.named_parameters())
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in found.values())
    return found


def weights(runtime: Runtime, run_dir: str) -> dict[str, torch.Tensor]:
    worker = load_trained_run(
        EvaluateConfig(run_dir=run_dir, precision="fp64", device="cpu"), runtime
    )
    return {name: p.detach() for name, p in worker.worker.parameters().items()}


def measured(runtime: Runtime, run_dir: str) -> None:
    write_comparison(CompressReportConfig(run_dir=run_dir, rounds=1), runtime)


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_ranks_with_logits_hold_the_full_frozen_teacher(ranks, taught, axis):
    config = replace(taught, run_dir=f"{taught.run_dir}-held-{axis}", precision="bf16")
    config = prepare_training(replace(config, strategy=StrategyConfig(**{axis: 2})), 2)
    first, last = ranks.run(2, held, config)
    assert (first is None) == (axis == "pipeline")
    (due,) = ranks.run(1, weights, taught.compress.teacher)
    assert last.keys() == due.keys()
    assert all(torch.equal(last[name], weight.bfloat16()) for name, weight in due.items())


def test_similarity_loss_is_a_mean_over_pairs_of_valid_positions():
    draw = torch.Generator().manual_seed(0)
    ours = torch.randn(3, 5, 6, dtype=torch.float64, generator=draw)
    theirs = torch.randn(3, 5, 9, dtype=torch.float64, generator=draw)  # another width
    valid = torch.arange(5) < torch.tensor([[5], [3], [0]])
    targets = torch.tensor([4, 2, 0])
    ours[1, 4] = 0  # not valid, and without a direction
    due = 0.0
    for row, places in enumerate((range(5), range(3))):
        pairs = [(i, j) for i in places for j in places]
        sides = [
            [F.cosine_similarity(x[row, i], x[row, j], 0) for i, j in pairs] for x in (ours, theirs)
        ]
        gaps = [(one - other) ** 2 for one, other in zip(*sides, strict=True)]
        due = due + targets[row] * sum(gaps) / len(gaps)
    leaf = ours.requires_grad_()
    found = similarity_loss_sum(leaf, theirs, valid, targets)
    torch.testing.assert_close(found, due)
    found.backward()
    assert leaf.grad[0].abs().min() > 0 and not leaf.grad[~valid].any()
    assert similarity_loss_sum(3 * theirs, theirs, valid, targets).item() == pytest.approx(
        0, abs=1e-12
    )
    assert similarity_loss_sum(leaf.half(), theirs.half(), valid, targets).dtype == torch.float32


@pytest.fixture(scope="module")
def matched(ranks, taught) -> TrainConfig:
    """Like `taught`, in micro-batches, with hidden states matched to a wider teacher's."""
    folder = Path(taught.run_dir).with_name("wide")
    teacher = ranks.run(1, made, folder, replace(TEACHER, width=24, layers=3), taught.data)[0]
    compress = CompressConfig(teacher=teacher.run_dir, match=[[0, 1], [1, 2]], match_weight=5.0)
    return replace(taught, compress=compress, micro_batch_size=1, run_dir=str(folder / "student"))


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_matching_is_identical_under_every_layout(ranks, matched, axis):
    one = losses(ranks, matched, f"one-{axis}")
    two = losses(
        ranks,
        matched,
        f"two-{axis}",
        strategy=StrategyConfig(**{axis: 2}),
        activation_checkpointing="block",
    )
    assert two == pytest.approx(one, rel=1e-10)
    alone = replace(matched.compress, match=[])
    apart = losses(ranks, matched, f"alone-{axis}", compress=alone)
    assert one[0] - apart[0] > 0.1


def asked(runtime: Runtime, config: TrainConfig) -> tuple[int, int, torch.Tensor]:
    """Return the teacher's forwards in a step and an evaluation, and a scaled gradient norm."""
    state, forwards = loop.start_run(config, runtime), []
    teacher, worker = state.compression.teacher, state.worker
    teacher.register_forward_hook(lambda *_: forwards.append(1))
    loader = loop.open_loader(config, state)
    batches = next(loader)
    loader.close()
    worker.forward_backward(batches)
    once = len(forwards)
    plain = worker.clip_grad_norm(0.0)
    worker.zero_grad()
    worker.forward_backward(batches, torch.tensor(1024.0, dtype=torch.float64))
    twice = len(forwards)
    with worker.evaluation_mode():
        worker.forward(worker.to_device(batches[0]))
    assert twice == 2 * once
    return once, len(forwards) - twice, worker.clip_grad_norm(0.0) / plain


@pytest.mark.parametrize("axis", ["replicate", "shard", "pipeline"])
def test_each_rank_that_distills_runs_the_teacher_once(ranks, matched, axis):
    config = replace(matched, run_dir=f"{matched.run_dir}-asked-{axis}")
    config = prepare_training(replace(config, strategy=StrategyConfig(**{axis: 2})), 2)
    micro_batches = 4 if axis == "pipeline" else 2
    for once, evaluated, scaled in ranks.run(2, asked, config):
        assert (once, evaluated) == (micro_batches, 0)
        assert scaled.item() == pytest.approx(1024, rel=1e-10)


UNMATCHED = {
    "each of ours once, e.g. [[1,3],[3,7]]": ([[1, 1], [1, 2]], {}),
    "must be pairs of blocks": ([[1]], {}),
    "set compress.teacher, or compress.match=[]": ([[1, 1]], {"teacher": ""}),
    "set strategy.context=1, or compress.match=[]": ([[1, 1]], {}),
    "set compress.merge=0, or compress.match=[]": ([[1, 1]], {"merge": 1}),
    "the blocks here are 0 to 1; try compress.match=[[1, 0]]": ([[7, 0]], {}),
}


@pytest.mark.parametrize("message", UNMATCHED)
def test_states_that_cannot_be_matched_are_one_message(message):
    match, changes = UNMATCHED[message]
    compress = replace(CompressConfig(teacher="t", match=match), **changes)
    strategy = StrategyConfig(context=2 if "context" in message else 1)
    (found,) = match_problems(compress, tiny.CLASSIFIER, strategy)
    assert found.startswith(f"compress.match={match}") and message in found
    assert match_problems(replace(compress, match_weight=0.0), tiny.CLASSIFIER, strategy) == []


def test_states_are_matched_with_those_of_the_same_positions():
    compress = CompressConfig(teacher="t", match=[[0, 2], [1, 1]])
    ours = TrainConfig(model=tiny.TRANSLATOR, compress=compress)
    theirs = replace(ours, model=replace(tiny.TRANSLATOR, encoder_layers=2))
    (message,) = teacher_problems(ours, theirs)
    assert message.endswith(
        "has 4 blocks, the first 2 of its encoder, as are the first 1 here; "
        "try compress.match=[[0, 1], [1, 2]]"
    )
    fit = replace(ours, compress=replace(compress, match=[[0, 1], [1, 2]]))
    assert teacher_problems(fit, replace(theirs, compress=CompressConfig())) == []
    (message,) = teacher_problems(fit, replace(theirs, compress=CompressConfig(pool_after=1)))
    assert "compress.teacher=t has compress.pool_after=1 and fewer" in message
    images = replace(ours, model=tiny.CLASSIFIER, compress=replace(compress, match=[[0, 5]]))
    other = replace(images, model=replace(tiny.CLASSIFIER, patch_size=2, pool="class_token"))
    found = teacher_problems(images, other)
    assert [problem.split("set ")[-1].split(",")[0] for problem in found[:2]] == [
        "model.patch_size=2",
        "model.pool=class_token",
    ]
    assert found[2].endswith("has 2 blocks; try compress.match=[[0, 1]]")


@pytest.fixture
def alone(ranks, taught, tmp_path) -> TrainConfig:
    """A run with a checkpoint whose teacher has been deleted."""
    shutil.copytree(taught.compress.teacher, tmp_path / "teacher")
    compress = replace(taught.compress, teacher=str(tmp_path / "teacher"))
    config = replace(taught, compress=compress, run_dir=str(tmp_path / "student"), steps=1)
    ranks.run(1, trained, prepare_training(config, 1), timeout_seconds=300.0)
    shutil.rmtree(tmp_path / "teacher")
    return config


def test_a_run_whose_teacher_was_deleted_can_be_loaded(ranks, runtime, alone):
    assert ranks.run(1, weights, alone.run_dir)[0]  # it can be loaded like any other
    measured(runtime, alone.run_dir)
    with pytest.raises(AlreadyFinishedError):
        prepare_training(alone, 1)
    longer = replace(alone, steps=2)
    with pytest.raises(UserError) as raised:
        prepare_training(longer, 1)
    (message,) = raised.value.problems
    assert message.startswith(f"compress.teacher={alone.compress.teacher} holds no run")
    assert message.endswith("without it: compress.teacher= resume_changed=[compress.teacher]")
    without = replace(longer.compress, teacher="")
    gone_on = replace(longer, compress=without, resume_changed=["compress.teacher"])
    ranks.run(1, trained, prepare_training(gone_on, 1), timeout_seconds=300.0)
    assert list_checkpoints(alone.run_dir)[-1][0] == 2


def test_an_incompatible_teacher_is_one_message(taught, tmp_path):
    here, folder = replace(taught, run_dir=str(tmp_path / "run")), Path(taught.compress.teacher)
    other = replace(here, compress=CompressConfig(teacher=str(folder.with_name("rum"))))
    message = tiny.no_teacher(other)
    assert "holds no run (no config.yaml) and no Hugging Face model (no config.json)" in message
    assert f"; did you mean compress.teacher={folder}?" in message
    more = replace(here, model=replace(STUDENT, vocab_size=288))
    assert "model.vocab_size=280, but model.vocab_size=288 here" in tiny.no_teacher(more)
    longer = replace(
        here, data=replace(here.data, seq_len=17), model=replace(STUDENT, max_positions=17)
    )
    assert "at most model.max_positions=16 tokens, but data.seq_len=17; set data.seq_len=16" in (
        tiny.no_teacher(longer)
    )
    pairs = replace(
        here,
        data=tiny.pairs_data(tmp_path / "pairs"),
        model=replace(tiny.TRANSLATOR, vocab_size=280),
    )
    assert "model.family=decoder, but model.family=encoder_decoder here" in tiny.no_teacher(pairs)
    (tmp_path / "words").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "words" / f"{split}.txt").write_text("zebra yak xylophone wolf vole " * 40)
    words = replace(here, data=replace(here.data, path=str(tmp_path / "words"), vocab_size=270))
    assert f"another tokenizer than the data here; set data.tokenizer={folder}" in tiny.no_teacher(
        words
    )
    young = replace(here, compress=CompressConfig(teacher=str(tmp_path / "young")))
    shutil.copytree(folder, tmp_path / "young", ignore=shutil.ignore_patterns("step-*"))
    assert "holds no checkpoint; name a run that has been trained" in tiny.no_teacher(young)


def test_a_classifiers_teacher_reads_the_same_images():
    ours = TrainConfig(model=replace(tiny.CLASSIFIER, classes=7, image_size=8, channels=1))
    assert teacher_problems(ours, replace(ours, model=replace(ours.model, layers=9))) == []
    for key in ("classes", "image_size", "channels"):
        other = replace(ours, model=replace(ours.model, **{key: 12}))
        (message,) = teacher_problems(ours, other)
        assert f"model.{key}=12, but model.{key}={getattr(ours.model, key)} here" in message


def test_a_chunked_loss_is_rejected(taught):
    (message,) = find_problems(replace(taught, loss=LossConfig(chunks=4)), 1)
    assert "loss.chunks=4 makes them in pieces; set loss.chunks=1" in message


def test_an_unfinished_teacher_gives_a_warning(taught, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        prepare_training(replace(taught, run_dir=str(tmp_path / "run")), 1)
    assert "is at step 0 of 1000: whoever starts later learns from a newer" in caplog.text
