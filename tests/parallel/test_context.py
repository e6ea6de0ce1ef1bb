"""Context parallelism: attention over a sequence sharded over ranks."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from tiny import each
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

from parallel.activation_checkpointing import checkpoint_activations
from parallel.comm_volume.closed_form import context_bytes
from parallel.comm_volume.counter import CollectiveCounter, Payload
from parallel.context import block_attention as tiles
from parallel.context.attention import METHODS, ContextParallel, zigzag_positions
from parallel.context.block_attention import KERNELS
from parallel.runtime import Runtime

B, K = 2, 8


@dataclass(frozen=True)
class Case:
    """One attention call: lengths, heads and mask."""

    length: int
    sees: str  # causal | all | padding | documents | causal mask
    key_length: int = 0  # 0 = the queries' own sequence
    heads: int = 4
    kv_heads: int = 4
    dtype: torch.dtype = torch.float64

    @property
    def keys(self) -> int:
        """Return the length of the key sequence."""
        return self.key_length or self.length


CASES = {
    "causal": Case(16, "causal"),
    "causal, an odd length": Case(13, "causal"),
    "causal, shorter than the chunks are many": Case(3, "causal"),
    "causal, grouped heads": Case(16, "causal", kv_heads=2),
    "causal, one head for all": Case(11, "causal", kv_heads=1),
    "causal by a mask": Case(16, "causal mask"),
    "all": Case(16, "all"),
    "all, an odd length": Case(13, "all", kv_heads=2),
    "padding": Case(16, "padding"),
    "padding, an odd length": Case(13, "padding", kv_heads=2),
    "documents": Case(16, "documents"),
    "documents, an odd length": Case(21, "documents", kv_heads=2),
    "another sequence": Case(8, "padding", key_length=20),
    "another sequence, odd lengths": Case(19, "padding", key_length=5, kv_heads=2),
    "all of another sequence": Case(9, "all", key_length=3),
}


def visible_of(case: Case) -> Callable[[Tensor, Tensor], Tensor | None]:
    """Which keys a query sees; a query that is padding sees nothing where documents are."""
    lengths = torch.tensor([case.keys, case.keys - case.keys // 3])
    documents = torch.full((B, 2 * case.length + 16), -1)
    documents[0, : case.length] = torch.arange(case.length) // 5
    documents[1, : case.length] = torch.arange(case.length) // 3

    def visible(rows: Tensor, columns: Tensor) -> Tensor | None:
        assert columns.max() < case.keys
        before = (columns <= rows[:, None])[None, None]
        if case.sees == "padding":
            return (columns < lengths[:, None])[:, None, None]
        if case.sees == "documents":
            same = documents[:, rows, None] == documents[:, None, columns]
            return same[:, None] & before
        assert case.sees != "causal", "asked for what needs no mask"
        return before if case.sees == "causal mask" else None

    return visible


def whole_tensors(case: Case) -> list[Tensor]:
    """Return query, key, value and loss weights of the outputs, for the full sequence."""
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (case.heads, case.length),
        (case.kv_heads, case.keys),
        (case.kv_heads, case.keys),
        (case.heads, case.length),
    ]
    tensors = [
        torch.randn(B, *shape, K, dtype=torch.float64, generator=generator) for shape in shapes
    ]
    return [tensor.to(case.dtype).double() for tensor in tensors]


def reference(case: Case) -> list[Tensor]:
    """Return output and query, key and value gradients of one process, in float64."""
    *inputs, weight = whole_tensors(case)
    query, key, value = (x.requires_grad_() for x in inputs)
    rows, columns = torch.arange(case.length), torch.arange(case.keys)
    mask = None if case.sees == "causal" else visible_of(case)(rows, columns)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=case.sees == "causal", enable_gqa=True
    )
    (out * weight).sum().backward()
    return [out.detach(), query.grad, key.grad, value.grad]


def part_of(whole: Tensor, positions: Tensor, padding: float) -> Tensor:
    """The given positions of a tensor, and a number at those behind its end."""
    length = whole.shape[2]
    part = whole[:, :, positions.clamp(max=length - 1)].clone()
    part[:, :, positions >= length] = padding
    return part


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("context",))


def gaps(runtime: Runtime, method: str, case: Case) -> list[float]:
    """Return the largest differences of local output and gradients from the full reference."""
    split = ContextParallel(mesh_of_all(), method)
    rows, columns = split.local_positions(case.length), split.local_positions(case.keys)
    *inputs, weight = whole_tensors(case)
    query, key, value = (
        part_of(x, positions, padding=3.0).to(case.dtype).requires_grad_()
        for x, positions in zip(inputs, (rows, columns, columns), strict=True)
    )
    visible = visible_of(case)
    out = split.attend_global(query, key, value, case.keys, visible, causal=case.sees == "causal")
    # A query that sees nothing has no gradient, whatever is made of its output.
    unseen = 5.0 if case.sees == "documents" else 0.0
    (out * part_of(weight, rows, padding=unseen).to(case.dtype)).sum().backward()
    if case.sees != "documents":
        assert out.isfinite().all()
        out = torch.where((rows < case.length)[:, None], out, 0.0)
    ours = [out.detach(), query.grad, key.grad, value.grad]
    due = [
        part_of(x, positions, padding=0.0)
        for x, positions in zip(reference(case), (rows, rows, columns, columns), strict=True)
    ]
    assert [x.dtype for x in ours] == [case.dtype] * 4
    return [(a.double() - b).abs().max().item() for a, b in zip(ours, due, strict=True)]


def wrong(found: list[list[list[float]]], calls: list, bound: float) -> list:
    """Return the calls whose differences are too large on any rank."""
    worst = [max(map(max, of_ranks)) for of_ranks in zip(*found, strict=True)]
    return [call for call, gap in zip(calls, worst, strict=True) if not gap < bound]


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_attention_equals_that_of_one_process(ranks, method, degree):
    calls = [(method, case) for case in CASES.values()]
    assert len(calls) > 10
    assert not wrong(ranks.run(degree, each, gaps, calls), calls, 1e-12)


@pytest.mark.parametrize("sees", ["causal", "documents"])
@pytest.mark.parametrize("method", METHODS)
def test_three_ranks(ranks, method, sees):
    case = Case(17, sees, heads=6, kv_heads=2)
    for differences in ranks.run(3, gaps, method, case):
        assert max(differences) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float32, 1e-5)])
def test_lower_precision(ranks, dtype, bound):
    case = replace(CASES["documents"], kv_heads=2, dtype=dtype)
    seen = ("causal", "documents", "all")
    calls = [(method, replace(case, sees=sees)) for method in METHODS for sees in seen]
    assert not wrong(ranks.run(2, each, gaps, calls), calls, bound)


def counted_bytes(runtime: Runtime, method: str, case: Case) -> tuple[Payload, Payload]:
    """What one attention moves, forward and backward: counted, and by the closed form."""
    with CollectiveCounter() as traffic:
        gaps(runtime, method, case)
    rows, keys = (2 * math.ceil(n / 2 / runtime.world_size) for n in (case.length, case.keys))
    due = context_bytes(
        method, (B, case.heads, rows, K), (B, case.kv_heads, keys, K), runtime.world_size, 8
    )
    counted = {name: size for (name, _), size in traffic.payload_bytes.items()}
    return counted, {name: size for name, size in asdict(due).items() if size}


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_bytes_equal_the_closed_form(ranks, degree):
    cases = [CASES["causal"], CASES["another sequence, odd lengths"]]
    calls = [(method, case) for method in METHODS for case in cases]
    for found in ranks.run(degree, each, counted_bytes, calls):
        for counted, due in found:
            assert counted == due and bool(due) == (degree > 1)


class Attending(torch.nn.Module):
    """A block that only attends."""

    def __init__(self, split: ContextParallel, case: Case):
        super().__init__()
        self.split, self.case, self.visible = split, case, visible_of(case)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        causal = self.case.sees == "causal"
        return self.split.attend_global(
            query, key, value, self.case.keys, self.visible, causal
        ).sin()


def recomputed_gap(runtime: Runtime, method: str, case: Case, mode: str) -> float:
    """Largest difference that recomputing or compiling makes to output and gradients."""
    split = ContextParallel(mesh_of_all(), method)
    columns = split.local_positions(case.length)
    results = []
    for changed in (False, True):
        block = Attending(split, case)
        if changed and mode == "compile":
            block.compile(backend="aot_eager", fullgraph=True)
        elif changed:
            checkpoint_activations(block, mode)
        inputs = [part_of(x, columns, 0.0).requires_grad_() for x in whole_tensors(case)[:3]]
        out = block(*inputs)
        out.pow(2).sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("sees", ["causal", "documents"])
@pytest.mark.parametrize("mode", ["block", "selective", "compile"])
@pytest.mark.parametrize("method", METHODS)
def test_recomputing_and_compiling_change_nothing(ranks, method, mode, sees):
    case = Case(12, sees, kv_heads=2)
    for difference in ranks.run(2, recomputed_gap, method, case, mode):
        assert difference < 1e-13


@pytest.mark.parametrize("mask", ["none", "causal", "some"])
def test_every_kernel_of_a_tile_computes_the_same(mask, monkeypatch):
    query, key, value, grad = whole_tensors(Case(7, "all", key_length=9 if mask == "some" else 7))
    sees = torch.rand(B, 1, 7, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    sees[:, :, 3] = False
    options = (sees if mask == "some" else None, mask == "causal")
    results = []
    for kernel in (KERNELS["cpu"], KERNELS["products"]):
        monkeypatch.setattr(tiles, "kernel_for", lambda *_, kernel=kernel: kernel)
        out, lse = tiles.tile_forward(query, key, value, *options)
        grads = tiles.tile_backward(grad, query, key, value, out, lse, *options)
        results.append([out, lse, *grads])
    for fused, products in zip(*results, strict=True):
        assert torch.allclose(fused, products, rtol=0, atol=1e-13)


def test_the_fused_kernel_of_cuda_takes_what_it_is_given():
    # On the meta device its signature and shapes are checked, no number is computed.
    query, key = (torch.empty(B, 4, n, K, dtype=torch.bfloat16, device="meta") for n in (6, 10))
    out, lse = KERNELS["cuda"].forward(query, key, key, None, False)
    assert (out.shape, lse.shape, lse.dtype) == (query.shape, query.shape[:3], torch.float32)
    grads = KERNELS["cuda"].backward(out, query, key, key, out, lse, None, False)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]


def test_zigzag_by_hand():
    assert [zigzag_positions(8, 2, part).tolist() for part in range(2)] == [
        [0, 1, 6, 7],
        [2, 3, 4, 5],
    ]
    # 9 positions in chunks of 3: the last chunk is padding.
    assert [zigzag_positions(9, 2, part).tolist() for part in range(2)] == [
        [0, 1, 2, 9, 10, 11],
        [3, 4, 5, 6, 7, 8],
    ]
    assert zigzag_positions(5, 1, 0).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_every_rank_has_the_same_causal_work(parts):
    length = 6 * parts
    positions = [zigzag_positions(length, parts, part) for part in range(parts)]
    assert sorted(torch.cat(positions).tolist()) == list(range(length))
    assert {int((p + 1).sum()) for p in positions} == {length * (length + 1) // 2 // parts}
