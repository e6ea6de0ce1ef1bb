"""Bytes on the wire per step: those counted equal the closed form, to the byte."""

from functools import partial

import pytest
import torch

from parallel.apply import parallelize
from parallel.config import StrategyConfig
from parallel.cost import ring_bytes, step_bytes
from parallel.mesh import build_mesh
from parallel.traffic import Traffic
from trainer.loss import count_valid, cross_entropy_sum
from trainer.model import Transformer, draw_rows
from trainer.verify import FAMILIES, make_batch, scale_down, split, world_size

COUNT, NORM = 8, 4  # bytes of the small ones: the number of targets (int64), the norm (float32)


def count_step(runtime, strategy, model_config):
    """Bytes by (collective, dtype) of a later step, and the parameters' shapes."""
    mesh = build_mesh(strategy, runtime.device)
    with torch.device("meta"):
        model = Transformer(model_config, torch.bfloat16)
    worker = parallelize(
        model, mesh, strategy, runtime.device, draw_rows=partial(draw_rows, model_config, 0),
        loss_sum=cross_entropy_sum, count_valid=count_valid, compute=torch.bfloat16,
    )  # fmt: skip
    micro_batches = split(make_batch(model_config, 0, 0), worker)
    for _ in range(3):  # DDP agrees on its buckets once, in the second step
        worker.zero_grad()
        with Traffic() as traffic:
            worker.forward_backward(micro_batches)
            worker.clip_grad_norm(1.0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return dict(traffic.payload_bytes), shapes, len(micro_batches)


@pytest.mark.parametrize(
    "strategy",
    [
        StrategyConfig(replicate=2),
        StrategyConfig(shard=2),
        StrategyConfig(shard=4),
        StrategyConfig(shard=2, reshard_after_forward=False),
        StrategyConfig(replicate=2, shard=2),
    ],
    ids=["ddp 2", "fsdp 2", "fsdp 4", "fsdp 2 weights kept", "hsdp 2x2"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_a_step_equal_the_closed_form(ranks, strategy, family):
    model = scale_down(FAMILIES[family])
    counted, shapes, micro_batches = ranks.run(world_size(strategy), count_step, strategy, model)[0]
    blocks = [shape for name, shape in shapes.items() if name.startswith("blocks.")]
    others = [shape for name, shape in shapes.items() if not name.startswith("blocks.")]
    due = step_bytes(blocks, others, strategy, micro_batches, compute_bytes=2, reduce_bytes=4)
    norms = NORM if strategy.shard > 1 else 0  # replicas know the norm without asking
    # Under HSDP the count crosses one flattened axis of all four ranks: one all-reduce.
    expected = {
        ("allreduce_", torch.int64): COUNT,
        ("allreduce_", torch.float32): due.all_reduce + norms,
        ("_allgather_base_", torch.bfloat16): due.all_gather,
        ("_reduce_scatter_base_", torch.float32): due.reduce_scatter,
    }
    assert counted == {key: value for key, value in expected.items() if value}
    assert due.all_reduce + due.all_gather > 0


def test_ring_bytes():
    assert ring_bytes(all_reduce=1000, others=0, ranks=4) == 1500
    assert ring_bytes(all_reduce=0, others=1000, ranks=4) == 750
    assert ring_bytes(all_reduce=1000, others=1000, ranks=1) == 0
