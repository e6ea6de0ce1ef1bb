"""Steps wait for no device, and a compiled block is one graph; benchmarks/graphs.py has all."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from parallel.parallel_model import ParallelModel
from parallel.strategy import world_size
from trainer.plan.cases import MODELS, PRESETS, small_run
from trainer.plan.host_waits import HostWaits
from trainer.plan.step_faults import count_graphs, find_host_waits
from trainer.plan.trace import trace_step

COMPILED = [
    ("decoder (Llama)", "tensor 2", "block", "bf16"),
    ("decoder (GPT-2)", "fsdp 2 × tensor 2", "block", "fp32"),
    ("encoder-decoder", "tensor 2, whole sequences", "selective", "fp16"),
    ("decoder (Llama)", "context 2, ulysses", "selective", "bf16"),
    ("encoder (ViT)", "fsdp 2 × tensor 2", "none", "bf16"),
]
STEPS = [
    ("decoder (Llama)", "single", "none", "fp16"),
    ("decoder (Llama)", "fsdp 2 × tensor 2", "selective", "bf16"),
    ("decoder (GPT-2)", "fsdp 2 × pipeline 2", "block", "bf16"),
    ("decoder (GPT-2)", "context 2, ring", "none", "bf16"),
    ("encoder (ViT)", "ddp 2 × tensor 2", "none", "bf16"),
    ("encoder-decoder", "context 2, ulysses", "selective", "bf16"),
    ("encoder (detector)", "tensor 2", "none", "bf16"),
]


def run_of(family: str, strategy: str, mode: str, precision: str):
    config, micro_batches = small_run(MODELS[family], PRESETS[strategy], mode, layers=2)
    return replace(config, precision=precision), world_size(config.strategy), micro_batches


@pytest.mark.parametrize("case", COMPILED, ids=", ".join)
def test_a_kind_of_block_is_one_graph(case):
    config, ranks, micro_batches = run_of(*case)
    found = count_graphs(replace(config, compile=True), ranks, micro_batches)
    assert found.one_per_kind, found


@pytest.mark.parametrize("case", STEPS, ids=", ".join)
def test_a_step_waits_for_no_device(case):
    assert find_host_waits(*run_of(*case)) == []


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_exchanges_are_kept_and_shifts_of_a_ring_repeated(method):
    sent = {}
    for mode in ("none", "selective"):
        config, ranks, micro_batches = run_of(
            "decoder (GPT-2)", f"context 2, {method}", mode, "bf16"
        )
        wire = trace_step(config, ranks, micro_batches).wire_bytes
        sent[mode] = sum(size for (_, name, _), size in wire.items() if name != "all_reduce")
    assert sent["none"] and (sent["selective"] == sent["none"]) == (method == "ulysses")


def test_what_a_step_reads_is_found():
    clip = ParallelModel.clip_grad_norm

    def reads(worker: ParallelModel, *args) -> torch.Tensor:
        norm = clip(worker, *args)
        return norm if norm.item() > 0 else -norm

    with mock.patch.object(ParallelModel, "clip_grad_norm", reads):
        found = find_host_waits(*run_of("decoder (Llama)", "single", "none", "bf16"))
    assert found == ["aten._local_scalar_dense.default"]


WAITING = {
    "aten._local_scalar_dense.default": lambda x, _: bool(x.sum() > 0),
    "aten.nonzero.default": lambda x, _: x.nonzero(),
    "aten.index.Tensor": lambda x, _: x[x > 0],
    "aten.index_put_.default": lambda x, _: x.index_put_((x > 0,), x + 1),
    "aten.masked_select.default": lambda x, _: x.masked_select(x > 0),
    "aten.repeat_interleave.Tensor": lambda x, _: x.repeat_interleave(x.long()),
    "tensor(…, device=…): a copy that is not pinned": lambda x, _: torch.tensor(2, device="cpu"),
    "Tensor.to(device) of a tensor that is not pinned": lambda _, own: (own + 1).to("cpu"),
}


@pytest.mark.parametrize("named", WAITING)
def test_what_waits_is_named(named):
    own = torch.ones(3)
    with (waits := HostWaits([own])), waits.copies:
        WAITING[named](torch.ones(3), own)
    assert waits.found == [named]


def test_what_the_host_has_is_free():
    own = torch.ones(3)
    with (waits := HostWaits([own])), waits.copies:
        x = own.to("cpu")  # pinned
        torch.full((), int(own.sum()), device="cpu") + torch.where(x > 0, x, 0.0)[torch.arange(2)]
        assert not waits.found
        x.sum().item()  # it has been copied
    assert waits.found == ["aten._local_scalar_dense.default"]
