"""Stages: where a model is cut, how much is in flight in a real run, and own schedules."""

import random
from collections import Counter
from itertools import combinations, pairwise
from unittest import mock

import pytest
import torch

from parallel.axis import find_axis
from parallel.pipeline.partition import balance_stages, stage_blocks
from parallel.pipeline.simulator import in_flight
from parallel.pipeline.stages import PipelineParallel, Stage
from parallel.pipeline.torch_schedules import list_actions
from parallel.strategy import StrategyConfig
from trainer.build import parallel_model
from trainer.config.train import LossConfig, VerifyConfig
from trainer.nn.cache import DecodingCache
from trainer.nn.flops import flops_per_block
from trainer.precision import PRECISIONS
from trainer.verify import compare as verify
from trainer.verify.cases import FAMILIES, make_batch, samples_per_step, scale_down, split_batch
from trainer.verify.compare import compare_layout, format_verdict

LLAMA = FAMILIES["decoder (Llama)"]


def test_cuts_by_hand():
    assert balance_stages([1, 1, 1, 1], 2) == [2]
    assert balance_stages([1, 1, 1, 1], 1) == []
    assert balance_stages([5, 1, 1, 1], 2) == [1]
    assert balance_stages([1, 1, 1, 5], 2) == [3]
    assert balance_stages([1, 2, 3, 4], 4) == [1, 2, 3]
    # Three of two blocks each would cost as much at most as this, but the others are more alike.
    assert balance_stages([2, 2, 4, 1, 1], 3) == [2, 3]


def costs_of_stages(costs, firsts):
    return [sum(costs[i:j]) for i, j in pairwise([0, *firsts, len(costs)])]


def test_no_cut_is_better():
    draw = random.Random(0)
    for _ in range(300):
        blocks = draw.randint(1, 8)
        costs = [draw.choice((1, 1, 2, 3, 7)) for _ in range(blocks)]
        stages = draw.randint(1, blocks)
        found = balance_stages(costs, stages)
        every = combinations(range(1, blocks), stages - 1)

        def worth(firsts, costs=costs):
            stages = costs_of_stages(costs, firsts)
            return max(stages), sum(cost**2 for cost in stages)

        assert len(found) == stages - 1
        assert worth(found) == min(map(worth, every))


def test_an_encoder_is_cheaper_than_its_decoder():
    config = scale_down(FAMILIES["encoder-decoder"], stages=7)
    costs = flops_per_block(config, 12, 12)
    assert costs[0] == costs[3] < costs[4] == costs[6] < costs[7]  # the last has the head
    # the first rank has one block more, the second the costly ones
    assert balance_stages(costs, 2) == [5]


def test_runs_of_blocks():
    assert stage_blocks(5, [2, 3]) == [("0", "1"), ("2",), ("3", "4")]
    assert stage_blocks(2, []) == [("0", "1")]


def most_in_flight(runtime, strategy):
    """By stage of this rank, the most micro-batches whose activations it has held at once."""
    worker = parallel_model(scale_down(LLAMA, stages=8), strategy, runtime, PRECISIONS["fp64"])
    most: Counter = Counter()
    forward = Stage.forward_one_chunk

    def watched(self, *args, **options):
        output = forward(self, *args, **options)
        held = len(self._computed.keys() | self._weight_jobs.keys())
        most[self.stage_index] = max(most[self.stage_index], held)
        return output

    batch = make_batch(worker.model.config, 0, 0, samples_per_step(strategy))
    with mock.patch.object(Stage, "forward_one_chunk", watched):
        worker.forward_backward(split_batch(batch, worker))
    stages = find_axis(worker.axes, PipelineParallel).stages
    kept = [s for s in stages if s._computed or s._weight_jobs or s._inputs]
    assert not kept  # nothing stays behind a step
    return dict(most)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"])
def test_micro_batches_in_flight_are_those_of_the_lists(ranks, schedule, degree):
    strategy = StrategyConfig(pipeline=degree, schedule=schedule)
    found: dict = {}
    for own in ranks.run(degree, most_in_flight, strategy):
        found |= own
    count = 2 * degree
    per_rank = len(found) // degree
    assert found == in_flight(list_actions(schedule, degree, per_rank, count))
    if schedule == "gpipe":
        assert found == dict.fromkeys(range(degree), count)
    if schedule == "1f1b":
        assert found == {stage: degree - stage for stage in range(degree)}


# Stage 0 and 1 on one rank, and the backward in two passes here and there.
OWN = """0F0,0F1,1F0,1F1,0F2,1F2,0F3,1F3,,1B0,1B1,0B0,1B2,0B1,1B3,0B2,0B3
,2F0,3F0,3B0,2F1,2I0,3F1,3I1,2F2,3F2,2B1,3B2,2W0,2B2,2F3,3F3,3W1,3B3,2B3
"""


@pytest.mark.parametrize("family", ["decoder (GPT-2)", "encoder-decoder"])
@pytest.mark.parametrize("degrees", [{}, {"shard": 2}], ids=["alone", "fsdp 2"])
def test_an_own_schedule_equals_one_process(ranks, tmp_path, family, degrees):
    path = tmp_path / "own.csv"
    path.write_text(OWN)
    strategy = StrategyConfig(pipeline=2, stages_per_rank=2, schedule_csv=str(path), **degrees)
    config = VerifyConfig(strategy=strategy, model=FAMILIES[family])
    assert (
        format_verdict(ranks.run(4 if degrees else 2, compare_layout, config)[0], 1e-10) == "equal"
    )


def test_stages_that_are_chosen_equal_one_process(ranks):
    strategy = StrategyConfig(pipeline=2, schedule="interleaved", split=[1, 2, 4])
    config = VerifyConfig(strategy=strategy, model=LLAMA)
    assert format_verdict(ranks.run(2, compare_layout, config)[0], 1e-10) == "equal"


def compare_in_pieces(runtime, config):
    with mock.patch.object(verify, "LossConfig", lambda smoothing: LossConfig(smoothing, chunks=3)):
        return compare_layout(runtime, config)


@pytest.mark.parametrize("schedule", ["gpipe", "zero_bubble", "zbv"])
@pytest.mark.parametrize("family", ["decoder (Llama)", "encoder-decoder"])
def test_a_loss_in_pieces_equals_one_process(ranks, schedule, family):
    strategy = StrategyConfig(pipeline=2, schedule=schedule)
    config = VerifyConfig(strategy=strategy, model=FAMILIES[family])
    assert format_verdict(ranks.run(2, compare_in_pieces, config)[0], 1e-10) == "equal"


def compare_with_few(runtime, config):
    with mock.patch.object(verify, "samples_per_step", lambda _strategy: 2):
        return compare_layout(runtime, config)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"])
def test_fewer_micro_batches_than_ranks_equal_one_process(ranks, schedule):
    strategy = StrategyConfig(pipeline=3, schedule=schedule)
    config = VerifyConfig(strategy=strategy, model=LLAMA)
    assert format_verdict(ranks.run(3, compare_with_few, config)[0], 1e-10) == "equal"


def written_logits(runtime, strategy: StrategyConfig) -> list[torch.Tensor]:
    """Logits of three tokens and of one behind them, with a cache."""
    worker = parallel_model(scale_down(LLAMA, stages=2), strategy, runtime, PRECISIONS["fp64"])
    with worker.evaluation_mode():
        cache = DecodingCache(worker.model, 8)
        tokens = torch.tensor([[1, 2, 3]]), torch.tensor([[4]])
        return [worker.forward({"tokens": own}, cache) for own in tokens]


def test_a_pipeline_that_shares_sequences_writes_what_one_process_does(ranks):
    (one,) = ranks.run(1, written_logits, StrategyConfig())
    for other in ranks.run(4, written_logits, StrategyConfig(context=2, pipeline=2)):
        for ours, theirs in zip(other, one, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)
