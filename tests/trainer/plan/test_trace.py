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

# benchmarks/plan_memory.py has every preset, family and mode.
REAL = [
    ("decoder (Llama)", "fsdp 2", "none", 2),
    ("decoder (GPT-2)", "tensor 2", "selective", 4),
    ("encoder (ViT)", "ddp 2", "none", 2),
]


@pytest.mark.parametrize(("family", "strategy", "mode", "layers"), REAL)
def test_the_traced_peak_is_that_of_real_ranks(ranks, family, strategy, mode, layers):
    config, micro_batches = small_run(MODELS[family], PRESETS[strategy], mode, layers)
    size = world_size(config.strategy)
    real = ranks.run(size, real_peaks, config, micro_batches, 2)
    for rank in range(0, size, size // config.strategy.pipeline):
        traced = trace_step(config, size, micro_batches, rank)
        assert traced.peak_bytes == pytest.approx(min(real[rank]), rel=0.01)
        assert sum(traced.kinds.values()) == traced.peak_bytes


PRODUCTS = [
    StrategyConfig(pipeline=2, shard=2, tensor=2, schedule="zero_bubble"),
    StrategyConfig(replicate=8),
]


@pytest.mark.parametrize("strategy", PRODUCTS, ids=str)
def test_traced_bytes_are_the_closed_form(strategy):
    stages = len(stage_to_rank(strategy, strategy.pipeline))
    model = scale_down(FAMILIES["decoder (Llama)"], strategy.tensor, stages)
    counted, due = traced_traffic(strategy, model, world_size(strategy) - 1)
    assert counted == due and sum(due.values()) > 1_000


def test_blocks_and_micro_batches_are_extrapolated_exactly():
    model = replace(MODELS["decoder (GPT-2)"], width=32, heads=4, ffn_width=64)
    config, shapes = small_run(model, StrategyConfig(), "block", layers=6)
    (trace,) = trace_stages(config, 1, shapes[0], 4)
    whole = trace_step(config, 1, [shapes[0]] * 4)
    # A micro-batch in between may have a few operators more than the one that stands for it.
    assert trace.operators == pytest.approx(whole.operators, rel=0.01)
    assert trace.peak_bytes == pytest.approx(whole.peak_bytes, abs=8)  # a micro-batch's number
    peak = {"peak_bytes": whole.peak_bytes, "kinds": whole.kinds}
    assert replace(trace, operators=whole.operators, **peak) == whole


def test_a_trace_leaves_the_process_as_it_was():
    allocate = _fsdp_param.alloc_storage
    config, micro_batches = small_run(MODELS["decoder (GPT-2)"], StrategyConfig(shard=4), layers=1)
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


@pytest.mark.parametrize("family", ["encoder (CTC)", "encoder-decoder"])
def test_inputs_of_speech_follow_the_model(tmp_path, family):
    targets = "ctc" if family == "encoder (CTC)" else "tokens"
    data = replace(tiny.speech_data(tmp_path / "speech"), targets=targets)
    prepare_data(data)
    dataset = open_split(data, "train")
    batch = dataset.collate([dataset.sample(i, 0) for i in range(3)])
    model = replace(MODELS[family], inputs="audio", audio_stride=data.audio_stride)
    config, _ = small_run(model, StrategyConfig())
    assert config.data.kind == "speech"
    shapes = longest_inputs(config, 3)
    assert shapes.keys() - {"seeds"} == batch.keys()
    for name, array in batch.items():
        assert len(shapes[name].sizes) == array.ndim, name


def test_fake_tensors_of_one_size_are_told_apart():
    with FakeTensorMode():
        gathered, other = torch.zeros(4, 6), torch.zeros(4, 6)
        assert _is_view_of_all(gathered, gathered.view(24))
        assert not _is_view_of_all(gathered, other)
