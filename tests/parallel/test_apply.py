"""parallelize: the shards held by each rank; no rank ever holds the full model."""

from dataclasses import replace
from functools import partial, partialmethod
from unittest import mock

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from parallel.grad_norm import local_tensor
from parallel.mesh import AXES, build_mesh
from parallel.parallelize import ModelSpec, parallelize
from parallel.strategy import StrategyConfig, world_size
from trainer.build import build_worker
from trainer.config.train import TrainConfig
from trainer.loss import count_valid, cross_entropy_sum
from trainer.model import Transformer
from trainer.nn.init import init_rows
from trainer.nn.tensor_layout import TENSOR_LAYOUT
from trainer.verify.cases import FAMILIES, make_batch, scale_down


def drawn(runtime, strategy: StrategyConfig) -> dict:
    """Return the rows that a rank initialises and holds of a tied model."""
    config = replace(scale_down(FAMILIES["decoder (GPT-2)"]), vocab_size=64)
    asked: dict[str, int] = {}

    def draw(name, shape, start, stop):
        asked[name] = stop - start
        return init_rows(config, 0, name, shape, start, stop)

    mesh = build_mesh(strategy, runtime.device)
    with torch.device("meta"):
        model = Transformer(config)
    facts = ModelSpec(draw, cross_entropy_sum, count_valid, TENSOR_LAYOUT)
    worker = parallelize(model, facts, mesh, strategy, runtime.device)
    parameters = dict(model.named_parameters())
    local = sum(
        (p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters.values()
    )
    return {
        "axes": mesh.mesh_dim_names,
        "data": (worker.data_rank, worker.data_degree),
        "rows": {name: (asked[name], p.shape[0]) for name, p in parameters.items()},
        "share": local / sum(p.numel() for p in parameters.values()),
        "tied": model.head.output.weight is model.embed.tokens.weight,
        "devices": {p.device.type for p in model.parameters()},
    }


def test_a_rank_draws_and_holds_its_own_rows_alone(ranks):
    for rank, seen in enumerate(ranks.run(4, drawn, StrategyConfig(shard=4))):
        assert set(seen["axes"]) == set(AXES)
        assert seen["data"] == (rank, 4)
        assert seen["share"] == 0.25
        assert all(4 * own == all_rows for own, all_rows in seen["rows"].values())
        assert seen["tied"] and seen["devices"] == {"cpu"}


def held_by_stage(runtime) -> set[str]:
    """Return the parameters that a pipeline rank has initialised; it holds no others."""
    config = replace(scale_down(FAMILIES["decoder (GPT-2)"]), vocab_size=64)
    asked = set()

    def draw(name, shape, start, stop):
        asked.add(name)
        return init_rows(config, 0, name, shape, start, stop)

    strategy = StrategyConfig(pipeline=2)
    with torch.device("meta"):
        model = Transformer(config)
    facts = ModelSpec(draw, cross_entropy_sum, count_valid, TENSOR_LAYOUT, costs=(1.0, 1.0))
    mesh = build_mesh(strategy, runtime.device)
    worker = parallelize(model, facts, mesh, strategy, runtime.device)
    assert asked == worker.parameters().keys()
    return asked


def test_a_stage_draws_its_own_layers_alone(ranks):
    first, second = ranks.run(2, held_by_stage)
    # The head's projection is tied: it is drawn, on both ranks, as the embedding.
    assert first & second == {"embed.tokens.weight"}
    assert {name.partition(".attention")[0] for name in first if "attention." in name} == {
        "blocks.0"
    }
    assert {name.partition(".attention")[0] for name in second if "attention." in name} == {
        "blocks.1"
    }
    assert "embed.positions.weight" in first and "head.norm.weight" in second


def test_replicas_hold_everything(ranks):
    for seen in ranks.run(2, drawn, StrategyConfig(replicate=2)):
        assert seen["share"] == 1.0
        assert all(own == all_rows for own, all_rows in seen["rows"].values())
        assert seen["tied"]


def test_hybrid_sharding_holds_a_share_of_its_group(ranks):
    seen = ranks.run(4, drawn, StrategyConfig(replicate=2, shard=2))
    assert [s["data"] for s in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert {s["share"] for s in seen} == {0.5}


def test_a_tensor_rank_holds_its_part_of_every_matrix(ranks):
    for seen in ranks.run(4, drawn, StrategyConfig(tensor=4)):
        assert 0.25 < seen["share"] < 0.3  # norms, positions and biases behind a sum are whole
        assert seen["tied"]


def weights(runtime, strategy: StrategyConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    config = scale_down(FAMILIES["encoder-decoder"])
    with torch.device("meta"):
        model = Transformer(config)
    facts = ModelSpec(partial(init_rows, config, 5), cross_entropy_sum, count_valid, TENSOR_LAYOUT)
    mesh = build_mesh(strategy, runtime.device)
    parallelize(model, facts, mesh, strategy, runtime.device, parameters=dtype)
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def test_no_layout_changes_an_initial_weight(ranks):
    one = ranks.run(1, weights, StrategyConfig(), torch.float32)[0]
    for strategy in (
        StrategyConfig(replicate=2),
        StrategyConfig(shard=3),
        StrategyConfig(tensor=4),
        StrategyConfig(shard=2, tensor=2),
    ):
        for other in ranks.run(world_size(strategy), weights, strategy, torch.float32):
            assert all(torch.equal(other[name], weight) for name, weight in one.items())


def graphs(runtime, strategy: StrategyConfig) -> int:
    """Return the number of graphs compiled for all blocks of a model with dropout, in two steps."""
    config = scale_down(FAMILIES["decoder (Llama)"], tensor=strategy.tensor, stages=3)
    worker = build_worker(
        TrainConfig(model=config, strategy=strategy, compile=True, precision="fp32"), runtime
    )
    torch._dynamo.reset()
    counters.clear()
    for step in range(2):
        worker.zero_grad()
        worker.forward_backward([make_batch(config, 0, step)])
    assert len(worker.model.blocks) == 4
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("strategy", [StrategyConfig(shard=2), StrategyConfig(tensor=2)])
def test_one_compiled_block_serves_for_all(ranks, strategy):
    assert ranks.run(2, graphs, strategy, timeout_seconds=300.0) == [1, 1]


def compiled_gap(runtime, strategy: StrategyConfig) -> float:
    """Return the largest difference of a gradient when recomputed blocks are compiled."""
    config = scale_down(FAMILIES["decoder (Llama)"], tensor=strategy.tensor, stages=2)
    torch._dynamo.reset()
    counters.clear()
    found = []
    for compiled in (False, True):
        traced = partialmethod(torch.nn.Module.compile, backend="aot_eager")
        job = TrainConfig(model=config, strategy=strategy, precision="fp64", compile=compiled)
        with mock.patch.object(torch.nn.Module, "compile", traced):
            worker = build_worker(replace(job, activation_checkpointing="block"), runtime)
        for step in range(2):  # gradients add up
            worker.forward_backward([make_batch(config, 0, step)])
        found.append([local_tensor(gradient) for gradient in worker.gradients()])
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("strategy", [StrategyConfig(tensor=2), StrategyConfig(shard=2, tensor=2)])
def test_compiled_blocks_are_recomputed_to_the_same_gradients(ranks, strategy):
    for gap in ranks.run(world_size(strategy), compiled_gap, strategy, timeout_seconds=300.0):
        assert gap < 1e-12
