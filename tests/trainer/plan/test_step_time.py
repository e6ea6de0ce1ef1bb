"""Predicted times: limits of data sheets, bytes of the closed form, a published run."""

from dataclasses import MISSING, fields, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parallel.activation_checkpointing import checkpoint_activations
from parallel.comm_volume.closed_form import step_bytes
from parallel.pipeline.torch_schedules import list_actions
from parallel.strategy import StrategyConfig
from trainer.config.hardware import ACCELERATORS
from trainer.config.train import ModelConfig
from trainer.model import Transformer
from trainer.nn.flops import flops_per_block
from trainer.plan.collective_time import Ring, axis_ring
from trainer.plan.constants import Constants, Fit
from trainer.plan.layout import Layout, strategy_of
from trainer.plan.machine import Machine, named_machine
from trainer.plan.step_time import TimeModel
from trainer.plan.work import block_works, encoder_length, model_work

TINY = ModelConfig(
    layers=4,
    width=64,
    heads=8,
    kv_heads=4,
    ffn_width=128,
    vocab_size=100,
    max_positions=64,
    image_size=8,
    patch_size=4,
    channels=3,
    classes=7,
)
FAMILIES = {
    "decoder": TINY,
    "windows": replace(TINY, sliding_window=8, full_attention_every=2),
    "images": replace(TINY, family="encoder", pool="class_token"),
    "masked text": replace(TINY, family="encoder", inputs="tokens", outputs="tokens"),
    "translation": replace(TINY, family="encoder_decoder", encoder_layers=2, activation="gelu"),
}
LLAMA_8B = ModelConfig(
    layers=32,
    width=4096,
    heads=32,
    kv_heads=8,
    ffn_width=14336,
    vocab_size=128256,
    max_positions=8192,
    tied=False,
)
# Everything reaches its peak and nothing costs anything beside it.
IDEAL = Constants(
    **{field.name: 1.0 for field in fields(Constants) if field.default is MISSING}
    | {"half_tokens": 0.0, "half_width": 0.0, "launch_seconds": 0.0, "latency_seconds": 0.0}
    | {"pointwise": 0.0, "overlap": 0.0, "overlap_sharded": 0.0}
)
# A second for each 1e12 FLOP, GB in a host, and tenth of a GB beyond.
MACHINE = Machine("toy", "hopper", 1e12, 1e12, 1e12, 1e9, 1e8, linked=8, memory=1e9)


def model(config=TINY, samples=64, constants=IDEAL, strategy=None, **options):
    work = model_work(config, samples, 64, 64, **options)
    return TimeModel(work, MACHINE, constants, strategy or StrategyConfig())


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_multiply_as_often_as_flops_says(family):
    config = FAMILIES[family]
    inside = encoder_length(config, 16)
    blocks = block_works(config, 64, inside)
    causal = [config.family == "decoder" and family != "windows" for _ in blocks]
    if family == "windows":
        causal = [False, True, False, True]
    if family == "translation":  # the halves of self-attention alone
        own = 2 * 64 * 64 * 64
        mine = [6 * (b.products + b.scores + (own / 2 if b.branches == 3 else 0)) for b in blocks]
    else:
        mine = [
            6 * (b.products + b.scores * (2 if c else 1))
            for b, c in zip(blocks, causal, strict=True)
        ]
    due = flops_per_block(replace(config, classes=0, vocab_size=0), 64, 16)
    if family == "images":
        due[0] -= 2 * 2 * 4 * 3 * 4**2 * 64  # of the patches
    assert mine == pytest.approx(due)


def test_an_ideal_machine_takes_the_flops_of_the_products():
    time = model().step(Layout(micro_batch=8))
    scores = 3.5 / 6 * 2 * sum(b.scores for b in model().work.blocks)  # 1 + 2.5 of a forward
    total = model().work.flops - 2 * 6 * sum(b.scores for b in model().work.blocks)
    assert time.products == pytest.approx(64 * total / 1e12)
    assert time.attention == pytest.approx(64 * 6 * scores / 1e12)
    assert time.exposed == time.bubble == 0
    assert time.total == pytest.approx(sum(time.terms().values()))


def test_tensor_and_context_ranks_divide_the_products():
    whole = model().step(Layout(micro_batch=8)).products
    for layout in (Layout(tensor=4, micro_batch=8), Layout(context=4, micro_batch=8)):
        assert model().step(layout).products == pytest.approx(whole / 4)
    assert model().step(Layout(shard=4, micro_batch=8)).products == pytest.approx(whole / 4)


@pytest.mark.parametrize("family", ["decoder", "images"])
def test_recomputation_adds_what_torch_computes_again(family):
    config = FAMILIES[family]
    counted = []
    for mode in ("none", "block"):
        with torch.device("meta"):
            built = Transformer(replace(config, dropout=0.0))
            tokens, images = torch.zeros(8, 64, dtype=torch.int64), torch.zeros(8, 3, 8, 8)
        for block in built.blocks.values():
            checkpoint_activations(block, mode)
        with FlopCounterMode(display=False) as counter:
            built({"tokens": tokens, "source": tokens, "images": images}).sum().backward()
        flops = counter.get_flop_counts()["Global"]
        counted.append(flops[torch.ops.aten.mm] + flops.get(torch.ops.aten.addmm, 0))
    work = model_work(config, 8, 64, 64)
    times = TimeModel(work, MACHINE, IDEAL, StrategyConfig())
    none, block = (times.step(Layout(micro_batch=8, recomputed=m)) for m in ("none", "block"))
    assert block.products - none.products == pytest.approx((counted[1] - counted[0]) / 1e12)
    assert block.attention == pytest.approx(none.attention * 4.5 / 3.5)


def test_what_nothing_hides_takes_the_bytes_of_the_closed_form():
    fast = replace(MACHINE, products=1e30, attention=1e30)
    work = model_work(TINY, 64, 64)
    times = TimeModel(work, fast, IDEAL, StrategyConfig())
    shapes = [(block.weights,) for block in work.blocks] + [(work.outer_weights,)]
    for shard, bandwidth in ((8, 1e9), (16, 8 * 1e8)):  # eight cards of a host share a ring
        layout = Layout(shard=shard, micro_batch=2)
        moved = step_bytes(
            shapes, [], strategy_of(layout, StrategyConfig()), 64 // shard // 2, 2, 4
        )
        sent = (moved.all_gather + moved.reduce_scatter) * (shard - 1) / shard
        assert times.step(layout).data == pytest.approx(sent / bandwidth, rel=0.01)


def test_communication_is_hidden_up_to_its_share():
    constants = replace(IDEAL, overlap_sharded=0.25)
    slow = replace(MACHINE, products=1e9, attention=1e9)
    work = model_work(TINY, 64, 64)
    layout = Layout(shard=8, micro_batch=8)
    hidden = TimeModel(work, slow, constants, StrategyConfig()).step(layout).data
    fast = replace(MACHINE, products=1e30, attention=1e30)
    whole = TimeModel(work, fast, constants, StrategyConfig()).step(layout).data
    assert hidden == pytest.approx(whole / 4)


def test_rings_know_what_is_near():
    layout = Layout(replicate=2, shard=4, context=2, tensor=4)
    assert axis_ring(layout, "tensor", 8) == Ring(4, 4)
    assert axis_ring(layout, "context", 8) == Ring(2, 2)
    assert axis_ring(layout, "shard", 8) == Ring(4, 1)
    assert axis_ring(layout, "copies", 8) == Ring(4, 2)
    assert axis_ring(layout, "shard", 72) == Ring(4, 4)


def test_a_simulated_bubble_is_the_formulas_where_stages_are_alike():
    # No head, so that stages cost alike; a backward takes twice its forward.
    constants = replace(IDEAL, attention_backward=2.5 / 2)
    bare = replace(model(constants=constants).work, head=0.0, logits=0.0, costs=(1.0,) * 4)
    times = TimeModel(bare, MACHINE, constants, StrategyConfig())
    layout = Layout(pipeline=4, schedule="1f1b", micro_batch=8)
    lists = list_actions("1f1b", 4, 1, 8)
    assert times.step(layout, lists).bubble == pytest.approx(times.step(layout).bubble)
    assert times.step(layout).bubble > 0


def test_the_slowest_rank_decides():
    times = model()
    layout = Layout(pipeline=4, schedule="1f1b", micro_batch=8)
    parts = times.pipeline_ranks(layout)
    assert [part.head for part in parts] == [False, False, False, True]
    assert sum(count for part in parts for _, count in part.counts) == 4
    seconds = [times.rank_time(layout, part).total for part in parts]
    time = times.step(layout)
    assert time.products + time.attention == pytest.approx(8 * max(seconds))


def test_frozen_weights_have_no_gradient():
    learned, frozen = model(), model(learned_share=0.01)
    layout = Layout(micro_batch=8)
    head = 3 * 2 * 64 * learned.work.head / 1e12
    whole = learned.step(layout).products - head
    assert frozen.step(layout).products - head == pytest.approx(whole * 2 / 3)


def test_a_published_run_is_predicted():
    # pytorch/torchtitan, docs/performance.md: 8B, FSDP on 8 × H100 of 96 GB and 500 W, 2 × 8,192
    # tokens each, every second product recomputed: 2.84 s.
    machine = named_machine("h100", "bf16")
    assert machine is not None
    slower = (500 / 700) ** 0.5
    machine = replace(
        machine,
        products=machine.products * slower,
        attention=machine.attention * slower,
        memory_bandwidth=2.4e12,
    )
    work = model_work(LLAMA_8B, 16, 8192)
    times = TimeModel(work, machine, Fit.read().constants, StrategyConfig())
    seconds = times.step(Layout(shard=8, micro_batch=2, recomputed="half")).total
    assert seconds == pytest.approx(2.84, rel=0.15)


def test_accelerators_have_what_a_plan_needs():
    for name, device in ACCELERATORS.items():
        for precision in device.tflops if name != "cpu" else ():
            machine = named_machine(name, precision)
            assert machine is not None
            assert min(machine.products, machine.memory, machine.link, machine.network) > 0
    assert named_machine("a100", "fp8") is None
    given = named_machine("h100", "fp8", 4, memory_gib=60.0, network_gbit=800.0)
    assert given is not None
    assert (given.linked, given.network, given.memory) == (4, 1e11, 60 * 2**30)
    assert given.attention < given.products
