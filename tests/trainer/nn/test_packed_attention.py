"""Attention of packed rows by cumulative lengths; a kernel of CUDA's only as far as without one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import build
from torch.utils._python_dispatch import TorchDispatchMode
from varlen import ReferenceKernel

from parallel.activation_checkpointing import KEPT, checkpoint_activations
from parallel.context import block_attention
from parallel.context.block_attention import tile_backward, tile_forward
from trainer.data.dataset import Dataset
from trainer.data.loader import TrainLoader, document_ends, evaluation_batches
from trainer.nn import packed_attention
from trainer.nn.cache import DecodingCache
from trainer.nn.packed_attention import KERNELS, find_kernel, pack_rows
from trainer.verify.cases import FAMILIES, make_batch, scale_down
from trainer.verify.features import BERT, FEATURES

CUDA = KERNELS["cuda"]


def test_ends_by_hand():
    ids = np.array([[0, 0, 1, 2, 2, 2], [0] * 6, [4, 4, 4, 4, -1, -1]])
    assert document_ends(ids).tolist() == [[2, 3, 6, 6], [6, 6, 6, 6], [4, 6, 6, 6]]
    assert document_ends(ids[1:]).tolist() == [[6, 6], [4, 6]]
    assert document_ends(ids[:, :1]).tolist() == [[1], [1], [1]]


def test_offsets_by_hand():
    ends = torch.tensor([[2, 3, 6, 6], [6, 6, 6, 6]])
    packed = pack_rows(ends, 6, 0, CUDA)
    assert packed.offsets_N.tolist() == [0, 2, 3, 6, 6, 12, 12, 12, 12]
    assert packed.offsets_N.dtype == torch.int32


class Windows(Dataset):
    """One window of two documents, and one of one."""

    def __len__(self):
        return 2

    def sample(self, index, seed):
        return {"tokens": np.zeros(6, np.int64), "targets": np.zeros(6, np.int64)}

    def collate(self, samples):
        batch = {name: np.stack([s[name] for s in samples]) for name in samples[0]}
        return batch | {"documents": np.array([[0, 0, 1, 1, 1, 1], [0] * 6])}


def test_loaders_send_the_ends():
    loader = TrainLoader(Windows(), 0, 2, 2, 0, 1, 0)
    (batch,) = next(loader)
    loader.close()
    (evaluated,) = evaluation_batches(Windows(), 2, 0, 1)
    for found in (batch, evaluated):
        assert found["document_ends"].tolist() == [[2, 6], [6, 6]]


def batch_of(config, documents=True):
    batch = make_batch(replace(config, vocab_size=61), 3, 0)
    if documents:
        batch["document_ends"] = torch.from_numpy(document_ends(batch["documents"].numpy()))
    return batch


def trained(model, batch):
    """Logits and the gradients of all weights."""
    model.zero_grad()
    logits = model(batch)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("family", ["decoder (Llama)", "decoder (Gemma 3)", "decoder (GPT-2)"])
def test_a_model_by_lengths_equals_it_by_masks(family):
    config = scale_down((FAMILIES | FEATURES)[family])
    model, batch, calls = build(config), batch_of(config), []
    due = trained(model, batch)
    with ReferenceKernel(calls):
        ours = trained(model, batch)
    assert len(calls) == len(model.blocks)
    torch.testing.assert_close(ours, due, rtol=0, atol=1e-12)


def test_a_window_needs_no_documents():
    config = scale_down(FEATURES["decoder (Gemma 3)"])
    batch, model, calls = batch_of(config, documents=False), build(config), []
    batch = {name: batch[name] for name in ("tokens", "seeds")}
    due = trained(model, batch)
    with ReferenceKernel(calls):
        torch.testing.assert_close(trained(model, batch), due, rtol=0, atol=1e-12)
    windows = [arguments[-1] for arguments in calls]
    assert windows == [5] * sum(block.windowed for block in model.blocks.values())


def test_decoding_behind_a_prompt_has_a_mask():
    model, calls = build(scale_down(FEATURES["decoder (Gemma 3)"])).eval(), []
    tokens = batch_of(model.config)["tokens"]
    due, cache = model({"tokens": tokens}), DecodingCache(model, capacity=12)
    with ReferenceKernel(calls):
        parts = [model({"tokens": part}, cache=cache) for part in tokens.split([7, 4, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), due, rtol=0, atol=1e-12)
    assert len(calls) == sum(block.windowed for block in model.blocks.values())  # of the prompt


def test_documents_of_an_encoder():
    config = replace(scale_down(BERT), segments=0)
    model, batch, calls = build(config), batch_of(scale_down(FAMILIES["decoder (Llama)"])), []
    due = trained(model, batch)
    with ReferenceKernel(calls):
        torch.testing.assert_close(trained(model, batch), due, rtol=0, atol=1e-12)
        assert len(calls) == len(model.blocks) and not calls[0][-2]
        # Padding may also be in front: it needs the mask.
        trained(model, batch | {"source_valid": torch.ones(batch["tokens"].shape).bool()})
    assert len(calls) == len(model.blocks)


def test_documents_without_ends_need_the_mask():
    config = scale_down(FAMILIES["decoder (Llama)"])
    model, batch, calls = build(config), batch_of(config, documents=False), []
    due = model(batch)
    with ReferenceKernel(calls):
        assert torch.equal(model(batch), due) and not calls


@pytest.mark.parametrize("mode", ["none", "block", "selective"])
def test_a_compiled_block_is_one_graph(mode, monkeypatch):
    """Attention by a kernel of meta tensors, as dynamo traces CUDA's."""
    config = scale_down(FAMILIES["decoder (Llama)"])
    monkeypatch.setitem(KERNELS, "meta", CUDA._replace(fits=lambda *_: True))
    model, graphs = build(config, dtype=torch.bfloat16).to("meta"), []

    def backend(graph, _):
        graphs.append(str(graph.code))
        return graph

    for block in model.blocks.values():
        checkpoint_activations(block, mode)
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    batch = {name: x.to("meta") for name, x in batch_of(config).items() if name != "seeds"}
    model(batch).sum().backward()
    assert len(graphs) == 1
    assert "_flash_attention_forward" in graphs[0] or mode != "none"
    assert "repeat_interleave" not in graphs[0] and "scaled_dot" not in graphs[0]


def test_selective_recomputation_keeps_the_kernels_output():
    assert torch.ops.aten._flash_attention_forward.default in KEPT


class Recorder(TorchDispatchMode):
    """Records the arguments of attention."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if "_flash_attention_" in str(operator) or "_efficient_" in str(operator):
            names = [argument.name for argument in operator._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.calls.append({k: described(v) for k, v in given.items() if v is not None})
        return operator(*args, **(kwargs or {}))


def described(value):
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (False, 0), (True, 3)])
def test_the_kernel_gives_cuda_what_torchs_own_does(causal, window):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    query, key = (torch.empty(12, h, 8, device="meta", dtype=torch.bfloat16) for h in (4, 2))
    offsets = torch.empty(6, dtype=torch.int32, device="meta")
    shared = (query, key, key, offsets, offsets, 6, 6)
    with Recorder() as ours:
        out, lse = CUDA.forward(*shared, causal, window)
        grads = CUDA.backward(out, *shared[:3], out, lse, *shared[3:], causal, window)
    assert (out.shape, lse.shape) == (query.shape, (4, 12))
    assert [x.shape for x in grads] == [query.shape, key.shape, key.shape]
    sides = [window - 1 if window else -1, 0 if causal else -1]
    flag = sides == [-1, 0]
    with Recorder() as theirs:
        out, lse, rng = varlen._varlen_attn._init_fn(*shared, flag, None, sides, True)
        varlen._varlen_attn_backward._init_fn(
            out, *shared[:3], out, lse, *shared[3:], flag, rng, None, sides
        )
    for call in (*ours.calls, *theirs.calls):
        call.pop("unused", None)  # nothing to read
    assert ours.calls == theirs.calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [6, 32])
def test_a_masked_tile_on_cuda_is_no_matrix_product(dtype, rows, monkeypatch):
    kernel = block_attention.KERNELS["cuda, masked"]
    monkeypatch.setattr(block_attention, "kernel_for", lambda *_: kernel)
    query = torch.empty(2, 4, rows, 8, device="meta", dtype=dtype)
    key = torch.empty(2, 2, 10, 8, device="meta", dtype=dtype)
    mask = torch.empty(2, 1, rows, 10, device="meta", dtype=torch.bool)
    out, lse = tile_forward(query, key, key, mask, False)
    assert (out.shape, lse.shape) == (query.shape, query.shape[:3])
    grads = tile_backward(out, query, key, key, out, lse, mask, False)
    assert [x.shape for x in grads] == [query.shape, key.shape, key.shape]
    # The kernel reads the log-sum-exp of whole blocks of 32 rows.
    with Recorder() as recorder:
        tile_backward(out, query, key, key, out, lse, mask, False)
    assert recorder.calls[0]["logsumexp"] == (torch.Size([2, 4, 32]), torch.float32)
    bias = block_attention._aligned_mask(mask, query, 10)
    assert bias.shape == (2, 4, rows, 10) and bias.stride(2) % 8 == 0


def test_which_kernel_a_device_has(monkeypatch):
    assert find_kernel(torch.device("cpu"), torch.bfloat16, 64) is None
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    found = [
        find_kernel(cuda, dtype, width) is CUDA
        for dtype, width in [
            (torch.bfloat16, 64),
            (torch.float16, 256),
            (torch.float32, 64),
            (torch.bfloat16, 20),
            (torch.bfloat16, 264),
        ]
    ]
    assert found == [True, True, False, False, False]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert packed_attention.find_kernel(cuda, torch.float16, 64) is None
