"""A traced step: memory as real ranks need it, bytes as the closed form, any number of blocks."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param

from parallel.pipeline.schedules import stage_to_rank
from parallel.strategy import StrategyConfig, world_size
from parallel.tensor.recompute_gather import _is_view_of_all
from trainer.data import open_split, prepare_data
from trainer.plan.cases import MODELS, PRESETS, small_run
from trainer.plan.extrapolate import trace_stages
from trainer.plan.inputs import longest_inputs
from trainer.plan.real_peak import real_peaks
from trainer.plan.trace import trace_step
from trainer.plan.traffic import traced_traffic
from trainer.verify.cases import FAMILIES, scale_down

REAL = [
    ("decoder (Llama)", "fsdp 2", "none"),
    ("decoder (GPT-2)", "tensor 2", "selective"),
    ("encoder-decoder", "pipeline 2, 1f1b", "block"),
    ("encoder (ViT)", "ddp 2", "none"),
]


@pytest.mark.parametrize(("family", "strategy", "mode"), REAL)
def test_the_traced_peak_is_that_of_real_ranks(ranks, family, strategy, mode):
    config, micro_batches = small_run(MODELS[family], PRESETS[strategy], mode)
    size = world_size(config.strategy)
    real = ranks.run(size, real_peaks, config, micro_batches, 2)
    for rank in range(0, size, size // config.strategy.pipeline):
        traced = trace_step(config, size, micro_batches, rank)
        assert traced.peak_bytes == pytest.approx(min(real[rank]), rel=0.01)
        assert sum(traced.kinds.values()) == traced.peak_bytes


PRODUCTS = [
    StrategyConfig(replicate=2, shard=2, tensor=2),
    StrategyConfig(pipeline=2, replicate=2, context=2),
    StrategyConfig(pipeline=2, shard=2, tensor=2, schedule="zero_bubble"),
    StrategyConfig(replicate=8),
]


@pytest.mark.parametrize("strategy", PRODUCTS, ids=str)
def test_traced_bytes_are_the_closed_form(strategy):
    stages = len(stage_to_rank(strategy, strategy.pipeline))
    model = scale_down(FAMILIES["decoder (Llama)"], strategy.tensor, stages)
    for rank in (0, world_size(strategy) - 1):
        counted, due = traced_traffic(strategy, model, rank)
        assert counted == due and sum(due.values()) > 1_000


@pytest.mark.parametrize(
    "strategy", [StrategyConfig(shard=2), StrategyConfig(pipeline=2, schedule="1f1b")], ids=str
)
def test_blocks_and_micro_batches_are_extrapolated_exactly(strategy):
    model = replace(MODELS["decoder (Llama)"], width=32, heads=4, kv_heads=2, ffn_width=64)
    config, shapes = small_run(model, strategy, "block")
    config = replace(config, model=replace(config.model, layers=12, vocab_size=64))
    for trace in trace_stages(config, 2, shapes[0], 9):
        whole = trace_step(config, 2, [shapes[0]] * 9, trace.rank)
        assert trace == whole


def test_a_trace_leaves_the_process_as_it_was():
    allocate = _fsdp_param.alloc_storage
    config, micro_batches = small_run(MODELS["decoder (GPT-2)"], StrategyConfig(shard=4))
    first = trace_step(config, 4, micro_batches)
    assert not dist.is_initialized() and _fsdp_param.alloc_storage is allocate
    assert trace_step(config, 4, micro_batches) == first
    assert {axis for axis, _, _ in first.wire_bytes} == {"shard"} and first.host_reads == 0


def test_inputs_have_the_names_and_dims_of_the_data_s(tmp_path):
    made = {"pairs": tiny.pairs_data, "text": tiny.text_data, "images": tiny.image_data}
    families = {"pairs": "encoder-decoder", "text": "decoder (Llama)", "images": "encoder (ViT)"}
    for kind, make in made.items():
        data = make(tmp_path / kind)
        prepare_data(data)
        dataset = open_split(data, "train")
        batch = dataset.collate([dataset.sample(i, 0) for i in range(3)])
        config, _ = small_run(MODELS[families[kind]], StrategyConfig())
        shapes = longest_inputs(config, 3)
        assert shapes.keys() - {"seeds"} == batch.keys(), kind
        for name, array in batch.items():
            assert (len(shapes[name].sizes), shapes[name].dtype) == (
                array.ndim,
                torch.from_numpy(array).dtype,
            )


def test_fake_tensors_of_one_size_are_told_apart():
    with FakeTensorMode():
        gathered, other = torch.zeros(4, 6), torch.zeros(4, 6)
        assert _is_view_of_all(gathered, gathered.view(24))
        assert not _is_view_of_all(gathered, other)
