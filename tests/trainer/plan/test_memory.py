"""Closed forms of memory: parameters as real models have them, bytes as a trace counts them."""

import pytest
import torch

from parallel.strategy import StrategyConfig, world_size
from trainer.config.train import LoraConfig
from trainer.lora.adapter import add_adapters
from trainer.model import Transformer
from trainer.plan import parameters as count
from trainer.plan.cases import MODELS, PRESETS, small_run
from trainer.plan.in_flight import _listed, held_micro_batches
from trainer.plan.memory import MemoryModel
from trainer.plan.rank_plan import Held, Moment
from trainer.plan.trace import trace_step
from trainer.verify.features import FEATURES

SAMPLES = 2


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4)], ids=["all", "adapters"])
@pytest.mark.parametrize("family", [*MODELS, *FEATURES])
def test_parameters_are_those_of_the_model(family, lora):
    config, _ = small_run((MODELS | FEATURES)[family], StrategyConfig())
    model = config.model
    with torch.device("meta"):
        built = Transformer(model)
    add_adapters(built, lora)

    def sizes(module) -> tuple[int, int]:
        named = {} if module is None else dict(module.named_parameters())
        learned = sum(p.numel() for p in named.values() if p.requires_grad)
        return learned, sum(p.numel() for p in named.values()) - learned

    for number, block in built.blocks.items():
        cross, turns = block.cross_attention is not None, block.turn_norm is not None
        found = count.block_parameters(model, 1, lora, cross, turns)
        assert (found.learned, found.frozen) == sizes(block), number
    found = count.embedding_parameters(model, 1, lora)
    assert (found.learned, found.frozen) == sizes(built.embed)
    found = count.head_parameters(model, 1, lora)
    assert (found.learned, found.frozen) == sizes(built.head)
    found = count.bias_tables(model, lora)
    assert (found.learned, found.frozen) == sizes(built.relative_bias)


def test_what_schedules_hold():
    def held(schedule: str, ranks: int, micro_batches: int) -> list[Held]:
        strategy = StrategyConfig(pipeline=ranks, schedule=schedule)
        return list(held_micro_batches(strategy, micro_batches))

    first, then = Moment((5,), (0,), (False,), 0), Moment((4,), (0,), (True,), 0, sent=1)
    assert held("gpipe", 2, 5) == [Held((first, then))] * 2
    # All counts are linear in the number of micro-batches.
    for schedule in ("gpipe", "looped_bfs"):
        per_rank = 1 if schedule == "gpipe" else 2
        assert held(schedule, 2, 20) == list(_listed(schedule, 2, per_rank, 20))
    # arXiv 2104.04473: as many as there are ranks from a stage to the last.
    turns = [Held((Moment((n,), (0,), (True,), 0),), in_turn=True) for n in (4, 3, 2, 1)]
    assert held("1f1b", 4, 16) == turns
    assert held("1f1b", 4, 500) == turns


# benchmarks/plan_forms.py has every preset, family and mode.
ROWS = [
    ("encoder (ViT)", "fsdp 2", "block"),
    ("decoder (Llama)", "tensor 2", "selective"),
    ("decoder (Llama)", "pipeline 2, 1f1b", "none"),
    ("decoder (Llama)", "pipeline 2, dualpipev", "none"),
    ("decoder (Llama)", "pipeline 2, looped_bfs", "block"),
    ("decoder (Llama)", "fsdp 2, kept", "block"),
    ("encoder (ViT)", "pipeline 4", "block"),
]


@pytest.mark.parametrize(("family", "strategy", "mode"), ROWS)
def test_the_closed_form_is_the_trace(family, strategy, mode):
    config, micro_batches = small_run(MODELS[family], PRESETS[strategy], mode)
    held = held_micro_batches(config.strategy, len(micro_batches))
    forms = MemoryModel.of(config, device="cpu").terms(
        config.strategy, SAMPLES, len(micro_batches), mode, held
    )
    ranks = world_size(config.strategy)
    for rank, terms in enumerate(forms):
        first = rank * ranks // config.strategy.pipeline
        traced = trace_step(config, ranks, micro_batches, first)
        assert terms.total == pytest.approx(traced.peak_bytes, rel=0.02)
