"""The seam for optimizers: which parameter goes where, and one that is added and verified."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from torch import Tensor, nn
from toy_optimizer import TOYS, with_toys

from conf.validation.validate import find_problems
from parallel.errors import ConfigError
from parallel.strategy import StrategyConfig, world_size
from trainer.checkpoint.manifest import read_manifest
from trainer.config.train import OptimConfig, TrainConfig, VerifyConfig
from trainer.loop import start_run, take_step
from trainer.optim.parameter_groups import ParameterGroup, parameter_groups
from trainer.optim.registry import OPTIMIZERS, build_optimizer
from trainer.verify.cases import FAMILIES, make_batch, samples_per_step, split_batch
from trainer.verify.compare import compare_layout, first_mismatch, format_verdict, verify_all

OPTIM = OptimConfig(name="toy", lr=1e-2, eps=1e-6, warmup_steps=2, max_grad_norm=0.5)
LAYOUTS = {
    "fsdp 2": StrategyConfig(shard=2),
    "tensor 2": StrategyConfig(tensor=2),
    "pipeline 2": StrategyConfig(pipeline=2),
    "fsdp 2 × tensor 2": StrategyConfig(shard=2, tensor=2),
}
MATRIX = "blocks.0.attention.query.weight"
SHAPES = {
    name: torch.Size(shape)
    for name, shape in {
        "embed.tokens.weight": (23, 16),
        "embed.positions.weight": (16, 16),
        MATRIX: (16, 16),
        "blocks.0.attention.query.bias": (16,),
        "head.output.weight": (23, 16),
    }.items()
}


def test_one_optimizer_takes_every_parameter_and_matrices_decay():
    assert parameter_groups(SHAPES, OptimConfig(weight_decay=0.3)) == [
        ParameterGroup("adamw", 0.3, ("embed.tokens.weight", MATRIX, "head.output.weight")),
        ParameterGroup("adamw", 0.0, ("embed.positions.weight", "blocks.0.attention.query.bias")),
    ]


def test_another_optimizer_takes_the_rest_of_hidden_matrices():
    found = parameter_groups(SHAPES, replace(OPTIM, weight_decay=0.3), rest="adamw")
    assert set(found) == {
        ParameterGroup("toy", 0.3, (MATRIX,)),
        ParameterGroup("adamw", 0.3, ("embed.tokens.weight", "head.output.weight")),
        ParameterGroup("adamw", 0.0, ("embed.positions.weight", "blocks.0.attention.query.bias")),
    }


def test_optim_name_may_be_each_that_is_registered():
    found = find_problems(TrainConfig(optim=OptimConfig(name="none")), 1)
    assert f"optim.name=none is not one of {', '.join(OPTIMIZERS)}" in found


class Layers(nn.Module):
    """A hidden matrix, and a vector that it is not alone with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleDict({"0": nn.Linear(3, 4)})


def test_both_parts_skip_an_update_and_count_the_others():
    model = Layers()
    with mock.patch.dict(OPTIMIZERS, TOYS):
        optimizer = build_optimizer(dict(model.named_parameters()), OPTIM)
    assert {name: list(state) for name, state in optimizer.state().items()} == {
        "blocks.0.weight": ["momentum"],
        "blocks.0.bias": ["exp_avg", "exp_avg_sq"],
    }
    changed = []
    for skip in (0.0, 1.0, 0.0):
        before = [p.detach().clone() for p in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan if skip else 1.0)
        optimizer.step(0.1, torch.tensor(skip))
        changed.append(
            [not torch.equal(*two) for two in zip(model.parameters(), before, strict=True)]
        )
    assert changed == [[True, True], [False, False], [True, True]]
    assert optimizer.update_count().item() == 2
    optimizer.set_update_count(7)
    assert [part.update_count().item() for part in optimizer._parts] == [7, 7]


@pytest.mark.parametrize("family", ["decoder (Llama)", "decoder (GPT-2)"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_optimizer_of_whole_matrices_equals_one_process(ranks, name, family):
    config = VerifyConfig(LAYOUTS[name], FAMILIES[family], optim=OPTIM)
    found = ranks.run(world_size(config.strategy), with_toys, compare_layout, config)[0]
    assert format_verdict(found, 1e-10) == "equal"


@pytest.mark.parametrize("name", ["fsdp 2", "tensor 2"])
def test_verify_catches_one_that_takes_a_part_for_the_whole(ranks, name):
    optim = replace(OPTIM, name="local toy")
    config = VerifyConfig(LAYOUTS[name], FAMILIES["decoder (Llama)"], optim=optim)
    fault = first_mismatch(ranks.run(2, with_toys, compare_layout, config)[0], 1e-10)
    assert fault is not None and fault.step == 1
    wrong = {
        d.parameter
        for d in ranks.run(2, with_toys, compare_layout, replace(config, steps=1))[0]
        if d.quantity == "weight" and d.value > 1e-10
    }
    assert MATRIX in wrong and all(parameter.startswith("blocks.") for parameter in wrong)


def job(folder: Path, strategy: StrategyConfig) -> TrainConfig:
    return TrainConfig(
        model=tiny.LLAMA,
        strategy=strategy,
        optim=OPTIM,
        precision="fp64",
        device="cpu",
        steps=4,
        run_dir=str(folder),
    )


def trained(runtime, config: TrainConfig, stops: list[int]) -> dict[str, Tensor]:
    """Whole weights and moments at the last stop; at each the run is saved and then loaded."""
    for stop in stops:
        state = start_run(config, runtime)
        while state.step < stop:
            # As many samples whatever the layout.
            batch = make_batch(
                tiny.LLAMA, 0, state.step, samples_per_step(StrategyConfig(pipeline=2)) - 1
            )
            take_step(config, state, split_batch(batch, state.worker))
        tiny.save(config, state)
    assert state.optimizer.update_count().item() == stops[-1]
    everything = {n: tiny.whole(p) for n, p in state.worker.parameters().items()}
    for name, moments in state.optimizer.state().items():
        everything |= {f"{name}.{key}": tiny.whole(t) for key, t in moments.items()}
    return everything


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_resumes_to_the_bit_and_trains_the_same_in_every_layout(ranks, tmp_path, name):
    strategy = LAYOUTS[name]
    ranked, alone = world_size(strategy), job(tmp_path / "alone", StrategyConfig())
    due = ranks.run(1, with_toys, trained, alone, [4])[0]
    whole = ranks.run(ranked, with_toys, trained, job(tmp_path / "whole", strategy), [4])
    broken = ranks.run(ranked, with_toys, trained, job(tmp_path / "broken", strategy), [1, 3, 4])
    assert {key for found in whole for key in found} == due.keys()
    assert f"{MATRIX}.momentum" in due and "embed.tokens.weight.exp_avg" in due
    for ours, theirs in zip(whole, broken, strict=True):
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, due[key], rtol=1e-10, atol=1e-12, msg=key)


def test_a_checkpoint_of_one_process_goes_on_under_another_layout(ranks, tmp_path):
    config = job(tmp_path, StrategyConfig())
    saved = ranks.run(1, with_toys, trained, config, [2])[0]
    names = read_manifest(tmp_path / "checkpoints" / "step-00000002").tensors
    assert f"optimizer.{MATRIX}.momentum" in names
    assert "optimizer.head.norm.weight.exp_avg_sq" in names
    for found in ranks.run(4, with_toys, trained, job(tmp_path, LAYOUTS["fsdp 2 × tensor 2"]), [2]):
        assert all(torch.equal(tensor, saved[key]) for key, tensor in found.items())


def test_verify_refuses_what_it_has_no_reference_for():
    with pytest.raises(ConfigError, match=r"set optim.name to one of adamw$"):
        verify_all(VerifyConfig(optim=OptimConfig(name="adamw8bit")))
