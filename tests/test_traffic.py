"""Bytes on the wire per step: those counted equal the closed form, to the byte."""

import pytest
import torch

from parallel.config import StrategyConfig, world_size
from parallel.cost import ring_bytes, step_bytes
from trainer.cases import FAMILIES, STRATEGIES, scale_down
from trainer.traffic import step_traffic


@pytest.mark.parametrize("strategy", [n for n, s in STRATEGIES.items() if world_size(s) <= 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_a_step_equal_the_closed_form(ranks, strategy, family):
    degrees, model = STRATEGIES[strategy], scale_down(FAMILIES[family])
    counted, due = ranks.run(world_size(degrees), step_traffic, degrees, model)[0]
    assert counted == due
    moves = ("all_gather", torch.bfloat16)
    if degrees.shard == degrees.tensor == 1:
        moves = ("all_reduce", torch.float32)
    elif not degrees.sequence_parallel:
        moves = ("all_reduce", torch.bfloat16)
    assert due[moves] > 10_000


def test_bytes_of_shared_heads_that_fsdp_gathers(ranks):
    degrees, model = StrategyConfig(shard=2, tensor=4), scale_down(FAMILIES["decoder (Llama)"])
    counted, due = ranks.run(8, step_traffic, degrees, model)[0]
    assert model.kv_heads < 4 and counted == due


def test_the_closed_form_by_hand():
    blocks, others = [(10, 4), (3,)], [(7, 2)]
    forms = {"compute_bytes": 2, "reduce_bytes": 4}
    ddp = step_bytes(blocks, others, StrategyConfig(replicate=3), 5, **forms)
    assert (ddp.all_reduce, ddp.all_gather, ddp.reduce_scatter) == (57 * 4, 0, 0)
    # Over two ranks 3 rows are padded to 4 and 7 to 8; two micro-batches.
    fsdp = step_bytes(blocks, others, StrategyConfig(shard=2), 2, **forms)
    assert (fsdp.all_reduce, fsdp.all_gather) == (0, 2 * (2 * 44 + 16) * 2)
    assert fsdp.reduce_scatter == 2 * (44 + 16) * 4
    hsdp = step_bytes(blocks, others, StrategyConfig(replicate=2, shard=2), 1, **forms)
    assert (hsdp.all_reduce, hsdp.all_gather) == (60 * 4 // 2, (2 * 44 + 16) * 2)


def test_ring_bytes():
    assert ring_bytes(all_reduce=1000, others=0, ranks=4) == 1500
    assert ring_bytes(all_reduce=0, others=1000, ranks=4) == 750
    assert ring_bytes(all_reduce=1000, others=1000, ranks=1) == 0
