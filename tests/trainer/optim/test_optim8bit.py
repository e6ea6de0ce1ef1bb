"""AdamW with moments of 8 bits, against torchao's, and under every layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from torchao.optim import AdamW8bit as TorchaoAdamW
from torchao.optim.quant_utils import create_dynamic_map

from parallel.errors import UserError
from parallel.strategy import StrategyConfig, world_size
from trainer.config.train import ModelConfig, OptimConfig, TrainConfig
from trainer.loop import start_run, take_step
from trainer.optim import adamw8bit
from trainer.optim.adamw8bit import block_size, dequantize_blocks, dynamic_map, quantize_blocks
from trainer.optim.registry import build_optimizer
from trainer.verify.cases import make_batch, samples_per_step, split_batch

CONFIG = OptimConfig(name="adamw8bit", lr=1e-2, warmup_steps=0, weight_decay=0.3)
# Rows of 512 numbers: whole blocks of 256 also on each of two tensor ranks.
MODEL = ModelConfig(
    layers=2,
    width=512,
    heads=4,
    ffn_width=512,
    vocab_size=61,
    max_positions=12,
    norm="layernorm",
    bias=True,
    activation="gelu",
    tied=False,
)
LAYOUTS = {
    **tiny.TWO_RANKS,
    "fsdp 2 × tensor 2": StrategyConfig(shard=2, tensor=2),
}


def test_the_map_is_torchaos():
    for signed in (True, False):
        torch.testing.assert_close(dynamic_map(signed), torch.tensor(create_dynamic_map(signed)))


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_are_rounded_to_the_nearest_of_the_map(signed):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 64, generator=draw, dtype=torch.float64)
    x = x if signed else x.square()
    x[1], x[2, 5] = 0.0, 0.0
    values = dynamic_map(signed)
    codes, scale = quantize_blocks(x, values, 32)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and scale.shape == (6, 2)
    for row, blocks in enumerate(dequantize_blocks(codes, scale, values).unflatten(-1, (2, 32))):
        for number, block in enumerate(blocks):
            own = x[row].view(2, 32)[number]
            choice = values.double() * own.abs().max()
            nearest = choice[(own[:, None] - choice).abs().argmin(-1)]
            torch.testing.assert_close(block.double(), nearest, rtol=1e-6, atol=0)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Linear(512, 48)
        self.norm = nn.LayerNorm(48)


def test_updates_equal_torchaos():
    """Its blocks are of the flat tensor: the same where 256 divides a row."""
    ours, theirs = Layer(), Layer()
    decayed = [theirs.matrix.weight]
    others = [p for p in theirs.parameters() if p is not theirs.matrix.weight]
    reference = TorchaoAdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    optimizer = build_optimizer(dict(ours.named_parameters()), CONFIG)
    for step in range(6):
        for model in (ours, theirs):
            draw = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step(1e-2, torch.zeros(()))
        with torch.compiler.set_stance("force_eager"):  # no compiler is needed for that
            reference.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)
    state, due = optimizer.state()["matrix.weight"], reference.state[theirs.matrix.weight]
    assert state["exp_avg"].dtype == torch.uint8
    assert (state["exp_avg"].int() - due["exp_avg"].codes.int()).abs().max() <= 1
    torch.testing.assert_close(state["exp_avg_sq_scale"].flatten(), due["exp_avg_sq"].scale)


def test_pieces_of_a_matrix_are_updated_as_the_whole(monkeypatch):
    whole, parts = Layer(), Layer()
    for model, piece in ((whole, adamw8bit.PIECE), (parts, 5 * 512)):  # 48 rows: the last has 3
        monkeypatch.setattr(adamw8bit, "PIECE", piece)
        optimizer = build_optimizer(dict(model.named_parameters()), CONFIG)
        for step in range(3):
            draw = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            optimizer.step(1e-2, torch.zeros(()))
        assert optimizer.update_count().item() == 3
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


def test_moments_take_a_quarter_of_the_memory():
    matrix = nn.Parameter(torch.zeros(1024, 1024))
    optimizer = build_optimizer({"matrix": matrix}, CONFIG)
    held = sum(t.numel() * t.element_size() for t in optimizer.state()["matrix"].values())
    assert held == 2 * 1024**2 * (1 + 4 / 256)


def test_short_rows_and_vectors_keep_their_moments():
    for shape, block in {(8, 512): 256, (8, 96): 32, (8, 48): 0, (8, 100): 0, (512,): 0}.items():
        assert block_size(torch.zeros(shape)) == block


def test_a_skipped_update_changes_nothing():
    model = Layer()
    optimizer = build_optimizer(dict(model.named_parameters()), CONFIG)

    def everything() -> list[Tensor]:
        moments = [t for state in optimizer.state().values() for t in state.values()]
        return [t.detach().clone() for t in (*model.parameters(), *moments)]

    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.1, torch.zeros(()))
    before = everything()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step(0.1, torch.ones(()))
    assert optimizer.update_count().item() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


def job(folder: Path, strategy: StrategyConfig, optim: OptimConfig = CONFIG) -> TrainConfig:
    return TrainConfig(
        model=MODEL,
        strategy=strategy,
        optim=optim,
        precision="fp64",
        device="cpu",
        steps=4,
        run_dir=str(folder),
    )


def trained(runtime, config: TrainConfig, stops: list[int]) -> list[dict[str, Tensor]]:
    """Whole weights and moments at each stop, where the run is saved, and then loaded again."""
    found = []
    for stop in stops:
        state = start_run(config, runtime)
        while state.step < stop:
            # As many samples whatever the layout.
            batch = make_batch(
                MODEL, 0, state.step, samples_per_step(StrategyConfig(pipeline=2)) - 1
            )
            take_step(config, state, split_batch(batch, state.worker))
        tiny.save(config, state)
        everything = {n: tiny.whole(p) for n, p in state.worker.parameters().items()}
        for name, moments in state.optimizer.state().items():
            everything |= {f"{name}, {key}": tiny.whole(t) for key, t in moments.items()}
        found.append(everything)
    return found


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory):
    """A run in one process: its folder, and weights and moments after two steps and after four."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, ranks.run(1, trained, job(folder, StrategyConfig()), [2, 4])[0]


def test_a_run_that_goes_on_is_the_same_to_the_bit(ranks, alone, tmp_path):
    for name in ("tensor 2", "fsdp 2"):
        strategy = LAYOUTS[name]
        broken = ranks.run(2, trained, job(tmp_path / f"{name} broken", strategy), [1, 4])
        whole = ranks.run(2, trained, job(tmp_path / name, strategy), [4])
        for ours, theirs in zip(broken, whole, strict=True):
            assert all(torch.equal(ours[-1][key], t) for key, t in theirs[-1].items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_does_the_same_updates(ranks, alone, tmp_path, name):
    _, due = alone
    for (found,) in ranks.run(
        world_size(LAYOUTS[name]), trained, job(tmp_path, LAYOUTS[name]), [2]
    ):
        for key, tensor in found.items():
            if tensor.dtype == torch.uint8:  # what was just between two codes may be either
                assert (tensor.int() - due[0][key].int()).abs().max() <= 1, key
                assert (tensor != due[0][key]).float().mean() < 1e-3, key
            else:
                torch.testing.assert_close(tensor, due[0][key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_loads_under_another_layout_to_the_bit(ranks, tmp_path, name):
    strategy = LAYOUTS[name]
    saved = ranks.run(1, trained, job(tmp_path, StrategyConfig()), [1])[0][0]
    results = ranks.run(world_size(strategy), trained, job(tmp_path, strategy), [1])
    assert {key for (found,) in results for key in found} == saved.keys()
    for (found,) in results:
        assert all(torch.equal(tensor, saved[key]) for key, tensor in found.items())


def refused(runtime, config: TrainConfig) -> str:
    with pytest.raises(UserError) as raised:
        start_run(config, runtime)
    return str(raised.value)


def test_moments_of_another_kind_are_refused_on_every_rank(ranks, tmp_path):
    ranks.run(1, trained, job(tmp_path, StrategyConfig()), [1])
    plain = replace(CONFIG, name="adamw")
    cut = StrategyConfig(tensor=4)  # rows of 128 numbers
    for strategy, optim in ((LAYOUTS["pipeline 2"], plain), (cut, CONFIG)):
        config = job(tmp_path, strategy, optim)
        for message in ranks.run(world_size(strategy), refused, config):
            assert "holds other moments, the first of them" in message
            assert "set optim.name as in the run's config.yaml" in message
