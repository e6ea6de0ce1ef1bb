"""Bad numbers: found before they are learned from, said with their samples, left out as asked."""

import json
import math
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from poisoned import (
    BATCH,
    LAYOUTS,
    again_and_again,
    compared,
    ended,
    events,
    lines,
    parts,
    run,
    samples,
    train,
)
from torch import Tensor

from conf.validation.validate import fill_from_data
from parallel.errors import UserError
from parallel.grad_norm import local_tensor
from parallel.parallel_model import ParallelModel
from parallel.strategy import StrategyConfig, resolve_degrees, world_size
from trainer import loop
from trainer.checkpoint.folder import list_checkpoints
from trainer.config.train import (
    CheckpointConfig,
    EvalConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from trainer.data import prepare_data
from trainer.loop import resume
from trainer.metrics.jsonl import last_values
from trainer.metrics.recorder import Recorder
from trainer.report.page import render_page
from trainer.report.run_history import read_history
from trainer.resilience.bad_steps import BadStepGuard, BadStepPolicy
from trainer.run.run_dir import open_run_dir
from trainer.state import not_finite


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    data = tiny.text_data(tmp_path_factory.mktemp("guard"))
    draft = TrainConfig(
        data=data,
        model=ModelConfig(layers=2, width=16, heads=4, ffn_width=32, dropout=0.1),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        eval=EvalConfig(every=0, samples=8, test=False),
        checkpoint=CheckpointConfig(every=3),
        metrics=MetricsConfig(every=2, sample_tokens=0),
        precision="fp64",
        device="cpu",
        steps=7,
        batch_size=BATCH,
        micro_batch_size=2,
    )
    return fill_from_data(draft, prepare_data(data))


CASES = [
    *((layout, "nan") for layout in LAYOUTS),
    *(("ddp 2", poison) for poison in ("inf", "gradient")),
    *(("fsdp 2", poison) for poison in ("inf", "gradient")),
    ("single", "gradient"),
    ("tensor 2", "inf"),
    ("pipeline 2", "inf"),
]


@pytest.mark.parametrize(("layout", "poison"), CASES)
def test_a_skipped_step_is_one_that_was_left_out(ranks, config, tmp_path, layout, poison):
    last = world_size(LAYOUTS[layout]) - 1
    config, results = run(
        ranks,
        config,
        layout,
        compared,
        poison,
        {4},
        last,
        [0, 1, 2, 3, None, 5, 6],
        run_dir=str(tmp_path),
        on_bad_step="skip",
    )
    assert results == [([], "")] * (last + 1)
    (event,) = events(config)
    known = poison != "gradient"  # whose it is
    shared = layout not in ("ddp 2", "fsdp 2")  # of one share that all ranks read
    rank = (0 if layout in ("single", "pipeline 2") else last) if known else None
    assert event == {
        "event": "bad_step",
        "step": 5,
        "rank": rank,
        "kind": "loss" if known else "gradient",
        "action": "skip",
        "samples": samples(config, 4, slice(None) if shared or not known else slice(4, 8)),
    }
    losses = {line["step"]: line["loss"] for line in lines(config) if "loss" in line}
    assert sorted(losses) == [2, 4, 6, 7] and all(losses.values())


@pytest.mark.parametrize(
    ("layout", "poison"),
    [("single", "nan"), ("ddp 2", "inf"), ("fsdp 2", "nan"), ("fsdp 2", "gradient")],
)
@pytest.mark.parametrize("kill_after", [0, 7])
def test_a_rollback_is_a_run_whose_data_never_had_the_step(
    ranks, config, tmp_path, layout, poison, kill_after
):
    # Step 5 is bad, which step 6's line finds; the seventh step made is number 4 again.
    last = world_size(LAYOUTS[layout]) - 1
    config, results = run(
        ranks,
        config,
        layout,
        compared,
        poison,
        {4},
        last,
        [0, 1, 2, 3, 5, 6, 7],
        kill_after,
        run_dir=str(tmp_path),
        on_bad_step="rollback",
    )
    assert results == [([], "")] * (last + 1)
    (event,) = events(config)
    assert (event["step"], event["action"]) == (5, "rollback")
    assert set(event["samples"]) <= set(samples(config, 4))
    assert [line["step"] for line in lines(config) if "loss" in line] == [2, 4, 6, 7]


@pytest.mark.parametrize("layout", ["single", "ddp 2", "fsdp 2"])
@pytest.mark.parametrize("poison", ["nan", "gradient"])
def test_by_default_a_bad_step_ends_the_run(ranks, config, tmp_path, layout, poison):
    last = world_size(LAYOUTS[layout]) - 1
    config, results = run(ranks, config, layout, ended, poison, {4}, last, run_dir=str(tmp_path))
    for message in results:
        what = "loss is not finite at step 5 on rank" if poison == "nan" else "gradient is not"
        for word in (what, "step-00000003", "on_bad_step=skip or rollback", "optim.lr"):
            assert word in message
    assert [event["action"] for event in events(config)] == ["stop"]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3]
    assert ranks.run(1, finite, replace(config, strategy=StrategyConfig())) == [True]


def finite(runtime, config: TrainConfig) -> bool:
    """Whether all that the checkpoints hold is."""
    state = loop.start_run(replace(config, run_dir=f"{config.run_dir}/none"), runtime)
    good = True
    for step, _ in reversed(list_checkpoints(config.run_dir)):
        resume(replace(config, resume_step=step), state)
        good &= all(bool(t.isfinite().all()) for t in parts(state).values())
        good &= all(bool(t.isfinite().all()) for t in state.guard.state().values())
    return good


@pytest.mark.parametrize(
    ("policy", "data_steps"),
    [
        ("skip", [*range(10), None, *range(11, 14)]),
        ("rollback", [*range(10), *range(11, 15)]),
    ],
)
@pytest.mark.parametrize("layout", ["single", "ddp 2"])
def test_a_spike_is_a_bad_step(ranks, config, tmp_path, layout, policy, data_steps):
    last = world_size(LAYOUTS[layout]) - 1
    # It is killed behind the checkpoint at 9, with two steps more of the window than are known.
    config, results = run(
        ranks,
        config,
        layout,
        compared,
        "spike",
        {10},
        last,
        data_steps,
        10,
        run_dir=str(tmp_path),
        on_bad_step=policy,
        spike_sigma=6.0,
        spike_window=8,
        steps=14,
    )
    assert results == [([], "")] * (last + 1)
    (event,) = events(config)
    assert (event["step"], event["kind"], event["rank"]) == (11, "spike", None)
    assert event["samples"] == samples(config, 10)


@pytest.mark.parametrize("changes", [{"spike_sigma": 0.0}, {"spike_window": 16}])
def test_no_spike_is_found_where_none_is_looked_for(ranks, config, tmp_path, changes):
    rule = {"spike_sigma": 6.0, "spike_window": 8, "steps": 14} | changes
    config, _ = run(ranks, config, "single", ended, "spike", {10}, 0, run_dir=str(tmp_path), **rule)
    assert events(config) == []


@pytest.mark.parametrize("kill_after", [0, 4])
def test_so_many_in_a_row_end_the_run(ranks, config, tmp_path, kill_after):
    options = {"on_bad_step": "skip", "max_bad_steps": 2}
    apart, (message,) = run(
        ranks,
        config,
        "single",
        ended,
        "nan",
        {1, 3, 5},
        0,
        run_dir=str(tmp_path / "apart"),
        **options,
    )
    assert message == "" and len(events(apart)) == 3
    in_row, (message,) = run(
        ranks,
        config,
        "single",
        again_and_again,
        {2, 3, 4},
        kill_after,
        run_dir=str(tmp_path / "in row"),
        **options,
    )
    # Step 3 is the last before a checkpoint: what is in a row is counted across it.
    assert "not finite at step 4" in message and "max_bad_steps=2 in a row" in message
    assert [event["action"] for event in events(in_row)] == ["skip", "stop"]


@pytest.mark.parametrize("kill_after", [0, 5])
def test_returning_in_vain_ends_the_run(ranks, config, tmp_path, kill_after):
    config, results = run(
        ranks,
        config,
        "ddp 2",
        again_and_again,
        {3, 4, 5},
        kill_after,
        run_dir=str(tmp_path),
        on_bad_step="rollback",
        max_bad_steps=3,
        metrics=replace(config.metrics, every=1),
    )
    for message in results:
        assert "not finite at step 4" in message and "step-00000003" in message
        assert "max_bad_steps=3 times" in message
    assert [event["action"] for event in events(config)] == ["rollback", "rollback", "stop"]
    rollbacks = json.loads((tmp_path / "rollbacks.json").read_text())
    assert rollbacks == [{"step": 3, "samples": [[24, 32]]}, {"step": 3, "samples": [[32, 40]]}]


def test_a_rollback_before_the_first_checkpoint_starts_over(ranks, config, tmp_path):
    config, results = run(
        ranks,
        config,
        "fsdp 2",
        compared,
        "nan",
        {0},
        1,
        [1, 2, 3, 4, 5, 6, 7],
        run_dir=str(tmp_path),
        on_bad_step="rollback",
    )
    assert results == [([], ""), ([], "")]


def test_a_damaged_list_of_rollbacks_is_no_empty_one(ranks, config, tmp_path):
    config = replace(config, run_dir=str(tmp_path), on_bad_step="rollback")
    open_run_dir(config)
    (tmp_path / "rollbacks.json").write_text('[{"step": 3, "data_')
    (message,) = ranks.run(1, refused, config)
    assert "rollbacks.json is damaged" in message


def refused(runtime, config) -> str:
    with pytest.raises(UserError) as raised:
        loop.train(config, runtime)
    return str(raised.value)


def overflowing(runtime, config: TrainConfig) -> tuple[int, float, str]:
    """fp16 whose loss scale is far too high; and whose loss is never finite."""
    state = loop.start_run(config, runtime)
    state.loss_scale.scale.fill_(2.0**40)
    loader = loop.open_loader(config, state)
    recorder = mock.Mock()
    for _ in range(4):
        loop.take_step(config, state, next(loader))
    state.guard.process_bad_steps(
        state.step, state.worker, loader, recorder, lambda: None, partial(not_finite, state)
    )
    loader.close()
    scale = state.loss_scale.scale.item()
    message = train(runtime, replace(config, steps=30), "nan", set(range(99)), 0)[1]
    return recorder.log_event.call_count, scale, message


def test_an_overflow_of_fp16_is_healthy_until_its_scale_is_below_one(ranks, config, tmp_path):
    _, ((count, scale, message),) = run(
        ranks,
        config,
        "single",
        overflowing,
        run_dir=str(tmp_path),
        precision="fp16",
        checkpoint=CheckpointConfig(every=0),
    )
    assert count == 0 and scale == 2.0**36
    assert "the loss is not finite at step 1 on rank 0" in message


def lost(runtime, config: TrainConfig) -> tuple[float, str]:
    """fp16 with a loss that is NaN on one rank; the loss scale at the end, and the message."""
    state, message = train(runtime, config, "nan", {3}, 1)
    assert state is not None
    return state.loss_scale.scale.item(), message


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_of_fp16_that_is_not_finite_is_no_overflow(ranks, config, tmp_path, policy):
    config, results = run(
        ranks,
        config,
        "ddp 2",
        lost,
        run_dir=str(tmp_path),
        precision="fp16",
        on_bad_step=policy,
    )
    for scale, message in results:
        assert scale == 2.0**14
        assert ("the loss is not finite at step 4 on rank 1" in message) == (policy == "stop")
    (event,) = events(config)
    assert (event["step"], event["kind"], event["rank"]) == (4, "loss", 1)


TOO_FAST = OptimConfig(lr=1e39, warmup_steps=0)  # infinite in float32


@pytest.mark.parametrize(
    ("layout", "policy", "every"),
    [
        ("single", "stop", 1),
        ("fsdp 2", "stop", 3),
        ("ddp 2", "skip", 7),
        ("single", "rollback", 1),
        ("tensor 2", "rollback", 3),
    ],
)
def test_weights_that_are_not_finite_are_never_saved(
    ranks, config, tmp_path, layout, policy, every
):
    config, results = run(
        ranks,
        config,
        layout,
        ended,
        "nan",
        set(),
        0,
        run_dir=str(tmp_path),
        precision="fp32",
        optim=TOO_FAST,
        checkpoint=CheckpointConfig(every=every),
        on_bad_step=policy,
    )
    for message in results:
        assert "is not finite after step 1; nothing was saved since" in message
        assert message.startswith("model.") and "try a lower optim.lr" in message
        assert ("max_bad_steps=5 times" if policy == "rollback" else "on_bad_step=") in message
    assert [step for step, _ in list_checkpoints(tmp_path)] == [0] * (policy == "rollback")
    last = events(config)[-1]
    assert (last["kind"], last["step"], last["action"]) == ("update", 1, "stop")
    assert last["tensor"].startswith("model.") and len(last["samples"]) == BATCH


@pytest.mark.parametrize("what", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("layout", ["single", "fsdp 2", "pipeline 2"])
def test_any_tensor_of_any_rank_keeps_a_checkpoint_from_being_saved(
    ranks, config, tmp_path, layout, what
):
    last = world_size(LAYOUTS[layout]) - 1
    config, results = run(
        ranks, config, layout, ended, what, {5}, last, run_dir=str(tmp_path), on_bad_step="skip"
    )
    tensor = "model." if what == "weight" else "optimizer."
    for message in results:
        assert message.startswith(tensor) and message == results[0]
        assert "is not finite after step 6" in message and "step-00000003" in message
        assert f".{what} is not finite" in message
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3]
    assert ranks.run(1, finite, replace(config, strategy=StrategyConfig())) == [True]


@pytest.mark.parametrize("layout", ["single", "fsdp 2"])
def test_a_rollback_leaves_out_the_step_that_spoiled_the_weights(ranks, config, tmp_path, layout):
    last = world_size(LAYOUTS[layout]) - 1
    # Step 5 spoils them, which the loss of step 6 shows.
    config, results = run(
        ranks,
        config,
        layout,
        compared,
        "weight",
        {4},
        last,
        [0, 1, 2, 3, 5, 6, 7],
        run_dir=str(tmp_path),
        on_bad_step="rollback",
    )
    assert results == [([], "")] * (last + 1)
    assert [event["step"] for event in events(config)] == [5]
    rollbacks = json.loads((tmp_path / "rollbacks.json").read_text())
    assert rollbacks == [{"step": 3, "samples": [[32, 40]]}]


def unmeasured(runtime, config: TrainConfig, losses: list[float]) -> str:
    """Train where the evaluations have these losses."""
    told = iter(losses)

    def measure(run, split, samples, tokenizer=None):
        loss = next(told)
        return {"eval_loss": loss, "perplexity": loss, "bleu": loss}

    with mock.patch.object(loop, "evaluate_split", measure):
        return ended(runtime, config, "nan", set(), 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_evaluation_that_is_not_finite_ends_no_run(ranks, config, tmp_path, bad):
    config, results = run(
        ranks,
        config,
        "single",
        unmeasured,
        [bad, 2.0, bad],
        run_dir=str(tmp_path),
        eval=EvalConfig(every=3, test=False),
        checkpoint=CheckpointConfig(every=3, keep=1, keep_best=True),
    )
    assert results == [""]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [6, 7]  # the best, the newest
    text = (tmp_path / "metrics.jsonl").read_text()
    for line in text.splitlines():
        json.loads(line, parse_constant=pytest.fail)
    history = read_history(tmp_path)
    assert history.metric_curve("eval_loss", "valid") == [(6, 2.0)] and history.notes == []
    assert "bleu" in render_page([history], now=0.0)
    assert not any(key.startswith("valid") for key in last_values(tmp_path))  # 2.0 is not the last


def silent(runtime, config: TrainConfig) -> str:
    """Train to the end, where the model's logits are NaN; what the last lines say."""
    forward, said = ParallelModel.forward, []

    def nan(worker, *inputs):
        return forward(worker, *inputs) * torch.nan

    with (
        mock.patch.object(ParallelModel, "forward", nan),
        mock.patch.object(Recorder, "print_line", lambda _, text: said.append(text)),
    ):
        assert ended(runtime, config, "nan", set(), 0) == ""
    return " ".join(said)


def test_a_model_whose_logits_are_nan_writes_no_sample_and_ends_well(ranks, config, tmp_path):
    _, (said,) = run(
        ranks,
        config,
        "single",
        silent,
        run_dir=str(tmp_path),
        metrics=MetricsConfig(every=9, sample_tokens=5),
    )
    assert "no sample: the model's logits are not finite" in said
    assert [step for step, _ in list_checkpoints(tmp_path)][-1] == 7


def test_a_run_does_not_begin_with_weights_that_are_not_finite(ranks, config, tmp_path):
    config = replace(config, run_dir=str(tmp_path), on_bad_step="rollback", init_from="elsewhere")
    open_run_dir(config)
    (message,) = ranks.run(1, spoiled, config)
    assert "is not finite before step 1; choose another init_from" in message
    assert list_checkpoints(tmp_path) == []


def spoiled(runtime, config: TrainConfig) -> str:
    def load_first(init_from, run_dir, data, worker):
        next(worker.model.parameters()).detach().fill_(torch.nan)

    with mock.patch.object(loop, "load_initial_weights", load_first):
        return refused(runtime, config)


@pytest.mark.parametrize(
    ("text", "left_out"),
    [
        ('[{"step": 3, "data_steps": [4, 9]}]', {(64, 80), (144, 160)}),  # of older versions
        ('[{"step": 3, "samples": [[24, 32]]}]', {(24, 32)}),
        (
            '[{"step": 3, "data_steps": [4]}, {"step": 5, "samples": [[1, 2], [5, 9]]}]',
            {(64, 80), (1, 2), (5, 9)},
        ),
        ("[]", set()),
    ],
)
def test_what_was_left_out_is_read_in_samples(runtime, tmp_path, text, left_out):
    (tmp_path / "rollbacks.json").write_text(text)
    guard = BadStepGuard(BadStepPolicy("stop", 5, 0.0, 64), "nowhere", runtime.device)
    guard.read_rollbacks(str(tmp_path), batch_size=16)
    assert guard.skipped_steps == left_out


@pytest.mark.parametrize("text", ['[{"step": 3, "samples": [[9, 5]]}]', '[{"step": 3}]', "{}3"])
def test_what_was_left_out_and_cannot_be_read_is_refused(runtime, tmp_path, text):
    (tmp_path / "rollbacks.json").write_text(text)
    with pytest.raises(UserError, match=r"rollbacks\.json is damaged"):
        BadStepGuard(BadStepPolicy("stop", 5, 0.0, 64), "nowhere", runtime.device).read_rollbacks(
            str(tmp_path), batch_size=16
        )


READS = ("item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


def healthy(runtime, config: TrainConfig) -> list[str]:
    """What of the device a healthy step reads back."""
    config = replace(config, strategy=resolve_degrees(config.strategy, runtime.world_size))
    state = loop.start_run(config, runtime)
    loader = loop.open_loader(config, state)
    loop.take_step(config, state, next(loader))
    micro_batches, read, count_valid = next(loader), [], state.worker.count_valid

    def count_on_host(targets: Tensor) -> Tensor:
        (count := count_valid(targets)).on_host = True
        return count

    def reading(name: str) -> Any:
        read_tensor = getattr(Tensor, name)

        def note(tensor: Tensor, *args: Any) -> Any:
            on_host = getattr(tensor, "on_host", False)
            return read_tensor(tensor, *args) if on_host else read.append(name)

        return mock.patch.object(Tensor, name, note)

    state.worker.count_valid = count_on_host  # of batches that are not copied yet
    patches = [reading(name) for name in READS]
    for patch in patches:
        patch.start()
    try:
        loop.take_step(config, state, micro_batches)
    finally:
        for patch in patches:
            patch.stop()
        loader.close()
    return read


# Not in a pipeline, whose schedule reads the numbers of micro-batches, on the host.
@pytest.mark.parametrize(
    ("layout", "precision", "spike_sigma"),
    [
        ("single", "fp64", 6.0),
        ("ddp 2", "fp16", 0.0),
        ("fsdp 2", "fp64", 6.0),
        ("tensor 2", "fp16", 6.0),
    ],
)
def test_a_healthy_step_reads_nothing_back(ranks, config, tmp_path, layout, precision, spike_sigma):
    _, results = run(
        ranks,
        config,
        layout,
        healthy,
        run_dir=str(tmp_path),
        on_bad_step="skip",
        spike_sigma=spike_sigma,
        precision=precision,
    )
    assert not any(results)


def drifting(runtime, config: TrainConfig) -> str:
    """Train where rank 1's weights are changed a little behind the third step."""
    config = replace(config, strategy=resolve_degrees(config.strategy, runtime.world_size))
    take_step = loop.take_step

    def step(config, state, micro_batches):
        done = take_step(config, state, micro_batches)
        if runtime.rank == 1 and state.step == 3:
            local_tensor(state.worker.parameters()["head.norm.weight"].detach())[0] += 1e-3
        return done

    with mock.patch.object(loop, "take_step", step):
        return refused(runtime, config)


@pytest.mark.parametrize("layout", ["ddp 2", "tensor 2"])
def test_replicas_that_differ_end_the_run(ranks, config, tmp_path, layout):
    config, results = run(
        ranks,
        config,
        layout,
        drifting,
        run_dir=str(tmp_path),
        checkpoint=CheckpointConfig(every=4, check_replicas_every=2),
    )
    for message in results:
        assert message.startswith("replicas differ at step 4: ")
        assert "on ranks 0 and 1 of 2 with a copy" in message
    (event,) = events(config)
    assert (event["event"], event["step"], event["rank"]) == ("replicas_differ", 4, None)
    assert list_checkpoints(tmp_path) == []


def test_replicas_that_agree_go_unmentioned(ranks, config, tmp_path):
    config, _ = run(
        ranks,
        config,
        "fsdp 2",
        ended,
        "nan",
        set(),
        0,
        run_dir=str(tmp_path),
        checkpoint=CheckpointConfig(every=0, check_replicas_every=1),
    )
    assert events(config) == [] and len(list_checkpoints(tmp_path)) == 1
