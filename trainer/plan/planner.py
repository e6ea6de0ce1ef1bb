"""The plan of one training job: memory, time and layouts, from its configuration alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from parallel.pipeline.simulator import Lists
from trainer.config.lora import LAYERS, LoraConfig
from trainer.config.model import (
    ModelConfig,
    head_width_of,
    inputs_of,
    is_gated,
    longest_source,
)
from trainer.config.train import TrainConfig
from trainer.plan.constants import Fit
from trainer.plan.held_forms import RankingMemory, likely_held
from trainer.plan.layout import Layout, strategy_of
from trainer.plan.machine import GIB, Machine
from trainer.plan.memory import MemoryModel, MemoryTerms
from trainer.plan.rank_plan import Held, block_lengths
from trainer.plan.search import Found, Space, fits_anywhere, search_layouts
from trainer.plan.step_time import StepTime, TimeModel
from trainer.plan.work import Stack, Work, encoder_length, model_work

MOMENT_BYTES = {"adamw": 8.0, "adamw8bit": 2.1}  # of the optimizer's states, for each weight
SIZES = {"fp64": 8, "fp32": 4}  # bytes of what is computed with; all others have 2
# Of a card: what its allocator reserves for a byte of tensors (benchmarks/published_memory.py fits
# it), what CUDA, NCCL and cuBLAS have, what is full.
SPLINTERS, RESERVED, FULL = 1.12, 1.5 * GIB, 0.92
AllHeld = tuple[Held, ...]  # of each pipeline rank
MANY = 16  # shards; with more, gradients decide nothing
LARGEST_CLUSTER = 1 << 20  # devices; beyond that nothing is searched


@dataclass(frozen=True)
class Card:
    """The memory of a layout's ranks, in bytes, and which of them needs the most."""

    ranks: list[MemoryTerms]  # of every pipeline rank
    stage: int  # pipeline rank

    @property
    def terms(self) -> MemoryTerms:
        """Return the terms of the fullest pipeline rank."""
        return self.ranks[self.stage]

    def named(self) -> dict[str, float]:
        """Return the bytes of each term by name."""
        return {name: size for name, size in asdict(self.terms).items() if name != "streams"}

    @property
    def reserve(self) -> float:
        """Return what the card loses to splinters, streams and libraries."""
        return reserved_bytes(self.terms) - self.terms.total + RESERVED

    @property
    def total(self) -> float:
        """Return all that the card must have."""
        return self.terms.total + self.reserve


def reserved_bytes(terms: MemoryTerms) -> float:
    """Return what CUDA's allocator reserves where tensors have these bytes."""
    return SPLINTERS * (terms.total + terms.streams)


class Planner:
    """Memory and time of one job's layouts; the job's own layout plays no part.

    `length` is the mean length of the data's sequences, by which times are; 0 = that of the
    longest, by which memory is.
    """

    def __init__(
        self, config: TrainConfig, precision: str, machine: Machine, fit: Fit, length: int = 0
    ):
        self.config, self.machine, self.fit = config, machine, fit
        self.precision = precision
        self.work = job_work(config, precision, length)
        self.times = TimeModel(self.work, machine, fit.constants, config.strategy)
        self.limit = FULL * machine.memory
        self._forms: dict[tuple[type, int], MemoryModel] = {}  # by loss.chunks
        self._sizes: dict[tuple[Layout, int], list[tuple[float, float]]] = {}
        weights = sum(block.weights for block in self.work.blocks) + self.work.outer_weights
        state = 4 + self.work.learned_share * MOMENT_BYTES[config.optim.name]
        self._states = weights * state

    def micro_batches(self, layout: Layout) -> int:
        """Return the micro-batches of a rank's step."""
        return self.config.batch_size // (layout.data_ranks * layout.micro_batch)

    def _memory_forms(self, kind: type[MemoryModel], chunks: int) -> MemoryModel:
        if (kind, chunks) not in self._forms:
            loss = replace(self.config.loss, chunks=chunks)
            config = replace(self.config, loss=loss, precision=self.precision)
            self._forms[kind, chunks] = kind.of(config)
        return self._forms[kind, chunks]

    def rank_memory(
        self, layout: Layout, held: tuple[Held, ...] | None = None
    ) -> list[MemoryTerms]:
        """Return the memory of each pipeline rank.

        `held` is what a schedule holds at once, None = about what it does.
        """
        count = self.micro_batches(layout)
        if held is None:
            held = likely_held(layout.schedule, layout.pipeline, layout.stages_per_rank, count)
        strategy = strategy_of(layout, self.config.strategy)
        forms = self._memory_forms(MemoryModel, layout.chunks)
        return forms.terms(strategy, layout.micro_batch, count, layout.recomputed, held)

    def card(self, layout: Layout, held: AllHeld | None = None) -> Card:
        """Return the memory of the fullest pipeline rank."""
        ranks = self.rank_memory(layout, held)
        stage = max(range(len(ranks)), key=lambda rank: reserved_bytes(ranks[rank]))
        return Card(ranks, stage)

    def memory(self, layout: Layout) -> float:
        """Return the bytes that a card must have.

        Weights, gradients and moments fall with the shard axis and all else hardly depends on it:
        layouts of many shards that differ in nothing else share their terms. `card` is exact.
        """
        inner = layout.tensor > 1 or layout.pipeline > 1
        sharded = layout.shard > 1 or (inner and layout.replicate * layout.context > 1)
        count = self.micro_batches(layout)
        same = layout._replace(replicate=1, shard=min(layout.shard, MANY))
        if not sharded:
            same = layout._replace(replicate=min(2, layout.replicate))
        key = (same, count)
        if key not in self._sizes:
            self._sizes[key] = self._rank_sizes(same, count)
        total = max(state / layout.shard + rest for state, rest in self._sizes[key])
        return SPLINTERS * total + RESERVED

    def _rank_sizes(self, layout: Layout, count: int) -> list[tuple[float, float]]:
        """Return the bytes of the states and of all else of the ranks that may be the fullest."""
        held = likely_held(layout.schedule, layout.pipeline, layout.stages_per_rank, count)
        strategy = strategy_of(layout, self.config.strategy)
        forms = self._memory_forms(RankingMemory, layout.chunks)
        found = forms.terms(strategy, layout.micro_batch, count, layout.recomputed, held)
        sizes = []
        for terms in found:
            states = terms.weights + terms.gradients + terms.moments
            sharded = states + min(terms.streams, max(0.0, terms.weights - terms.gradients))
            rest = terms.total + terms.streams - sharded
            sizes.append((layout.shard * sharded, rest))
        return sizes

    def _least_memory(self, layout: Layout) -> float:
        """Return a lower bound: weights and moments of an average rank."""
        return self._states / (layout.pipeline * layout.tensor * layout.shard)

    def fits(self, layout: Layout) -> bool:
        """Return whether a layout fits into the card."""
        return self.memory(layout) <= self.limit

    def step(self, layout: Layout, lists: Lists | None = None) -> StepTime:
        """Return the time of a layout's step."""
        return self.times.step(layout, lists)

    def space(self, ranks: int, fixed: Mapping[str, Any]) -> Space:
        """Return what layouts of so many ranks are searched among."""
        config = self.config
        return Space(
            config.model,
            config.strategy,
            ranks,
            self.machine.linked,
            config.batch_size,
            config.data.seq_len,
            fixed,
            one_pass=config.compile or self.precision == "fp8",
        )

    def search(self, space: Space) -> Found:
        """Return the legal layouts, and those that fit with the time of their step."""
        return search_layouts(
            space,
            self.memory,
            self._least_memory,
            self.limit,
            lambda layout: self.step(layout).total,
        )

    def smallest(self, space: Space, step: int) -> int:
        """Return the least number of ranks, a multiple of `step`, that the job fits on; 0 = none.

        It doubles until a layout fits, then halves the interval.
        """

        def fits(count: int) -> bool:
            other = replace(space, ranks=count * step)
            return fits_anywhere(other, self.memory, self._least_memory, self.limit)

        count = 1
        while not fits(count):
            count *= 2
            if count * step > min(LARGEST_CLUSTER, space.samples * len(self.work.blocks) * 8):
                return 0
        low, high = count // 2, count  # numbers between may fit where the batch divides
        for between in range(low + 1, high):
            if fits(between):
                return between * step
        return count * step


def first_tries(ranks: int, linked: int) -> list[Layout]:
    """Return the layouts that people try first, one sample at a time."""
    tries = [Layout(replicate=ranks), Layout(shard=ranks)]
    if ranks > linked:
        tries += [
            Layout(replicate=ranks // linked, shard=linked),
            Layout(shard=ranks // linked, tensor=linked),
        ]
    elif ranks > 1:
        tries.append(Layout(tensor=ranks))
    return tries if ranks > 1 else [Layout()]


def job_work(config: TrainConfig, precision: str, length: int = 0) -> Work:
    """Return the work of a step; `length` is that of the data's sequences, 0 = the longest."""
    size, longest = SIZES.get(precision, 2), longest_source(config.model)
    source, target = length or longest or config.data.seq_len, length or config.data.seq_len
    if inputs_of(config.model) == "audio":  # lengths are those of recordings, in frames
        target = config.data.seq_len
        source = longest if config.model.audio_fill == "silence" else source
    positions = target if config.model.family == "decoder" else encoder_length(config.model, source)
    summed = {"bf16": 2, "fp16": 2}.get(config.strategy.reduce, max(4, size))
    return model_work(
        config.model,
        config.batch_size,
        target,
        source,
        compute_bytes=size,
        sum_bytes=summed,
        moment_bytes=MOMENT_BYTES[config.optim.name],
        learned_share=learned_share(config.model, config.lora),
        shrunk=block_lengths(config.model, config.compress, positions),
        smoothed=config.loss.label_smoothing > 0,
        stack=Stack(fused_pointwise=config.compile, float8=precision == "fp8"),
    )


def learned_share(model: ModelConfig, lora: LoraConfig) -> float:
    """Return the share of a block's weights that learn."""
    if not lora.rank:
        return 1.0
    width, inner = model.width, model.ffn_width
    query, key = (
        heads * head_width_of(model) for heads in (model.heads, model.kv_heads or model.heads)
    )
    sides = {"query": query, "output": query, "key": key, "value": key}
    sides |= {"up": inner, "down": inner} | ({"gate": inner} if is_gated(model) else {})
    all_weights = sum(width * side for side in sides.values())
    targets = [name for name in lora.targets or LAYERS if name in sides]
    return lora.rank * sum(width + sides[name] for name in targets) / all_weights
