"""Context parallelism: attention over a sequence that several ranks have parts of."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from parallel.context import METHODS, ContextSplit, zigzag
from parallel.runtime import Runtime

B, K = 2, 8


@dataclass(frozen=True)
class Case:
    """One attention: lengths, heads and who sees whom."""

    length: int
    sees: str  # causal | all | padding | documents | causal mask
    key_length: int = 0  # 0 = the queries' own sequence
    heads: int = 4
    kv_heads: int = 4
    dtype: torch.dtype = torch.float64

    @property
    def keys(self) -> int:
        """Positions of the sequence of the keys."""
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
    """Query, key, value, and the weight of each output in the loss, of the whole sequence."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(case.heads, case.length), (case.kv_heads, case.keys), (case.kv_heads, case.keys),
              (case.heads, case.length)]  # fmt: skip
    tensors = [
        torch.randn(B, *shape, K, dtype=torch.float64, generator=generator) for shape in shapes
    ]
    return [tensor.to(case.dtype).double() for tensor in tensors]


def reference(case: Case) -> list[Tensor]:
    """Output and gradients of query, key and value by one process, in float64."""
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


def gaps(runtime: Runtime, method: str, case: Case) -> list[float]:
    """Largest differences between this rank's part and the whole: output and gradients."""
    split = ContextSplit(dist.group.WORLD, method)
    rows, columns = split.positions(case.length), split.positions(case.keys)
    *inputs, weight = whole_tensors(case)
    query, key, value = (
        part_of(x, positions, padding=3.0).to(case.dtype).requires_grad_()
        for x, positions in zip(inputs, (rows, columns, columns), strict=True)
    )
    visible = visible_of(case)
    out = split.attend(query, key, value, case.keys, visible, causal=case.sees == "causal")
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_attention_equals_that_of_one_process(ranks, method, degree, case):
    for differences in ranks.run(degree, gaps, method, CASES[case]):
        assert max(differences) < 1e-12


@pytest.mark.parametrize("sees", ["causal", "documents"])
@pytest.mark.parametrize("method", METHODS)
def test_three_ranks(ranks, method, sees):
    case = Case(17, sees, heads=6, kv_heads=2)
    for differences in ranks.run(3, gaps, method, case):
        assert max(differences) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_one_rank_alone(ranks, case):
    for method in METHODS:
        assert max(ranks.run(1, gaps, method, CASES[case])[0]) < 1e-12


@pytest.mark.parametrize("sees", ["causal", "documents", "all"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision(ranks, method, sees, dtype):
    case = replace(CASES["documents"], sees=sees, kv_heads=2, dtype=dtype)
    bound = 0.1 if dtype == torch.bfloat16 else 1e-5
    for differences in ranks.run(2, gaps, method, case):
        assert max(differences) < bound


def test_zigzag_by_hand():
    assert [zigzag(8, 2, part).tolist() for part in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    # 9 positions in chunks of 3: the last chunk is padding.
    assert [zigzag(9, 2, part).tolist() for part in range(2)] == [
        [0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]
    ]  # fmt: skip
    assert zigzag(5, 1, 0).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_every_rank_has_the_same_causal_work(parts):
    length = 6 * parts
    positions = [zigzag(length, parts, part) for part in range(parts)]
    assert sorted(torch.cat(positions).tolist()) == list(range(length))
    assert {int((p + 1).sum()) for p in positions} == {length * (length + 1) // 2 // parts}
