"""Attention of packed documents by cumulative lengths, under every layout, equals one process."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tiny import each
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from varlen import REFERENCE, ReferenceKernel

from parallel.activation_checkpointing import checkpoint_activations
from parallel.context.attention import METHODS, ContextParallel
from parallel.runtime import Runtime
from parallel.strategy import StrategyConfig, world_size
from trainer.config.train import CompressConfig, VerifyConfig
from trainer.data.loader import document_ends
from trainer.nn.packed_attention import PackedAttention, pack_rows
from trainer.verify import compare
from trainer.verify.cases import COMPRESSED, FAMILIES, STRATEGIES
from trainer.verify.compare import compare_layout, format_verdict
from trainer.verify.features import FEATURES

B, K = 2, 8


@dataclass(frozen=True)
class Case:
    """The lengths of the documents of two rows, and how a query sees those before it."""

    lengths: tuple[tuple[int, ...], tuple[int, ...]]
    causal: bool = True
    window: int = 0
    heads: int = 4
    kv_heads: int = 2

    @property
    def length(self) -> int:
        """Return the length of a row."""
        return sum(self.lengths[0])

    @property
    def numbers(self) -> Tensor:
        """Return the document of each position, (B,S)."""
        return torch.stack([torch.repeat_interleave(torch.tensor(n)) for n in self.lengths])

    def packed(self) -> PackedAttention:
        """Return the attention within these documents."""
        ends_BM = torch.from_numpy(document_ends(self.numbers.numpy()))
        return pack_rows(ends_BM, self.length, self.window, REFERENCE)

    def mask(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Which keys a query sees, (B,1,R,C); queries behind the end are padding."""
        numbers = self.numbers
        own = numbers[:, rows.clamp(max=self.length - 1)]
        sees = own[:, :, None] == numbers[:, None, columns]
        if self.causal:
            sees = sees & (columns <= rows[:, None])
        if self.window:
            sees = sees & (columns > rows[:, None] - self.window)
        return sees[:, None]


CASES = [
    Case(((16,), (16,))),
    Case(((5, 11), (1, 15))),
    Case(((4, 4, 4, 4), (8, 1, 1, 6))),
    Case(((13,), (6, 7)), kv_heads=1),
    Case(((1, 1, 1), (2, 1)), kv_heads=4),
    Case(((21, 2), (3, 20)), window=4),
    Case(((16,), (16,)), window=3),
    Case(((5, 6), (1, 10)), causal=False),
    Case(((9, 9, 3), (21,)), causal=False),
]


def drawn(case: Case) -> list[Tensor]:
    """Return query, key, value and weights of the outputs in a sum, of all positions."""
    draw = torch.Generator().manual_seed(0)
    heads = case.heads, case.kv_heads, case.kv_heads, case.heads
    sizes = [(B, count, case.length, K) for count in heads]
    return [torch.randn(size, dtype=torch.float64, generator=draw) for size in sizes]


def local(x: Tensor, positions: Tensor, padding: float) -> Tensor:
    """The given positions of a tensor, and a number at those behind its end."""
    part = x[:, :, positions.clamp(max=x.shape[2] - 1)].clone()
    part[:, :, positions >= x.shape[2]] = padding
    return part


def gaps(runtime: Runtime, method: str, case: Case, change: str = "") -> float:
    """The largest difference of local output and gradients from attention with a mask."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("context",))
    split, places = ContextParallel(mesh, method), torch.arange(case.length)
    *inputs, weight = drawn(case)
    whole = [x.clone().requires_grad_() for x in inputs]
    due = F.scaled_dot_product_attention(
        *whole, attn_mask=case.mask(places, places), enable_gqa=True
    )
    (due * weight).sum().backward()
    positions = split.local_positions(case.length)
    packed, shards = case.packed(), [local(x, positions, 3.0).requires_grad_() for x in inputs]

    def attend(*inputs: Tensor) -> Tensor:
        return split.attend_global(*inputs, case.length, case.mask, case.causal, None, packed)

    block = torch.nn.Module()
    block.forward = attend
    if change:
        checkpoint_activations(block, change)
    out = block(*shards)
    assert out.isfinite().all()
    (out * local(weight, positions, 0.0)).sum().backward()
    real = (positions < case.length)[:, None]
    pairs = [(torch.where(real, out, 0.0), due)]
    pairs += [(x.grad, y.grad) for x, y in zip(shards, whole, strict=True)]
    return max((a - local(b, positions, 0.0)).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_packed_attention_over_ranks_equals_a_mask(ranks, degree):
    calls = [(m, replace(c, heads=12)) for m in METHODS for c in CASES if 12 % c.kv_heads == 0]
    for found in ranks.run(degree, each, gaps, calls):
        assert max(found) < 1e-12, [
            call for call, gap in zip(calls, found, strict=True) if gap > 1e-12
        ]


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_recomputing_changes_nothing(ranks, mode):
    calls = [(method, CASES[2], mode) for method in METHODS]
    for found in ranks.run(2, each, gaps, calls):
        assert max(found) < 1e-12


def only_windows_need_a_mask(runtime: Runtime, method: str, case: Case) -> bool:
    """Return whether attention asks for a mask."""
    asked = []

    def mask(self: Case, *positions: Tensor) -> Tensor:
        asked.append(positions)
        return original(self, *positions)

    original, Case.mask = Case.mask, mask
    try:
        gaps(runtime, method, case)
    finally:
        Case.mask = original
    return len(asked) > 1  # the reference asks once


def test_only_a_window_in_a_ring_needs_a_mask(ranks):
    calls = [(method, case) for method in METHODS for case in CASES]
    due = [method == "ring" and case.window > 0 for method, case in calls]
    assert ranks.run(2, each, only_windows_need_a_mask, calls) == [due, due]


def compare_packed(runtime: Runtime, config: VerifyConfig) -> tuple[str, int]:
    """The verdict on a layout by cumulative lengths, the reference by masks; calls of a kernel."""
    calls: list[Any] = []

    def run_layout(*arguments: Any) -> Any:
        with ReferenceKernel(calls):
            return layout(*arguments)

    def make_batch(*arguments: Any) -> dict[str, Tensor]:
        found = batch(*arguments)
        if "documents" in found:
            ends = document_ends(found["documents"].numpy())
            found["document_ends"] = torch.from_numpy(ends)
        return found

    layout, batch = compare.run_layout, compare.make_batch
    compare.run_layout, compare.make_batch = run_layout, make_batch
    try:
        return format_verdict(compare_layout(runtime, config), 1e-10), len(calls)
    finally:
        compare.run_layout, compare.make_batch = layout, batch


LLAMA, GEMMA = FAMILIES["decoder (Llama)"], FEATURES["decoder (Gemma 3)"]
POOLED = COMPRESSED["decoder (Llama)"]["pool"]
MODELS = [
    ("single", LLAMA, "auto", CompressConfig()),
    ("single", GEMMA, "auto", CompressConfig()),
    ("single", LLAMA, "auto", POOLED),
    ("single", LLAMA, "chat", CompressConfig()),
    ("fsdp 2", LLAMA, "chat", CompressConfig()),
    ("tensor 2", GEMMA, "auto", CompressConfig()),
    ("tensor 2", LLAMA, "auto", POOLED),
    ("pipeline 2, zero_bubble", LLAMA, "auto", CompressConfig()),
    *(
        (f"context 2, {method}", model, "chat" if model is LLAMA else "auto", CompressConfig())
        for method in METHODS
        for model in (LLAMA, GEMMA)
    ),
    ("context 2 × tensor 2", LLAMA, "auto", CompressConfig()),
    ("pipeline 2 × context 2, ring, zero_bubble", LLAMA, "auto", CompressConfig()),
    ("fsdp 2 × tensor 2 × pipeline 2", LLAMA, "auto", CompressConfig()),
]


@pytest.mark.parametrize(("strategy", "model", "task", "compress"), MODELS)
def test_training_by_lengths_equals_one_process_by_masks(ranks, strategy, model, task, compress):
    layout = STRATEGIES.get(strategy, StrategyConfig())
    config = VerifyConfig(layout, model, compress, task=task, steps=2)
    for verdict, calls in ranks.run(world_size(layout), compare_packed, config):
        assert verdict == "equal" and calls > 0
