"""Layouts on ranks with NCCL's rules equal one process, and what breaks a rule is named."""

import re
from dataclasses import replace

import pytest
import tiny
import torch
from torch import distributed as dist

from launch.cli.preflight import prepare_training
from parallel.strategy import resolve_degrees, world_size
from trainer import loop
from trainer.config.train import GenerateConfig, TrainConfig, VerifyConfig
from trainer.inference.sampling import sample_tokens
from trainer.inference.trained_run import load_trained_run
from trainer.run.run_dir import open_run_dir
from trainer.verify.cases import FAMILIES, STRATEGIES
from trainer.verify.compare import compare_layout, format_verdict
from trainer.verify.host_tensors import DEVICE, HOST, MixedTensorsError, track_host_tensors
from trainer.verify.nccl_like import NcclLikeError, on_nccl_like_ranks

# Each way to communicate once; `python launch/verify.py backend=nccl_like` walks through all.
CASES = {
    "ddp 2": "decoder (Llama)",
    "fsdp 2": "encoder (ViT)",
    "tensor 2": "decoder (GPT-2)",
    "pipeline 2, 1f1b": "decoder (GPT-2)",
    "pipeline 2, zbv": "encoder-decoder",
    "context 2, ring": "decoder (Llama)",
    "context 2, ulysses": "encoder-decoder",
    "hsdp 2×2": "decoder (Llama)",
}


@pytest.mark.parametrize("strategy", CASES)
def test_strategy_equals_one_process(ranks, strategy):
    config = VerifyConfig(
        steps=2,
        strategy=STRATEGIES[strategy],
        model=FAMILIES[CASES[strategy]],
        backend="nccl_like",
    )
    found = ranks.run(world_size(config.strategy), compare_layout, config)[0]
    assert format_verdict(found, 1e-10) == "equal"


def both_send_first(runtime):
    x, y = torch.ones(3, device=runtime.device), torch.empty(3, device=runtime.device)
    other = 1 - runtime.rank
    sent = dist.isend(x, other)
    received = dist.irecv(y, other)
    for work in (sent, received):
        work.wait()


def receives_without_a_send(runtime):
    x = torch.ones(3, device=runtime.device)
    dist.all_reduce(x)
    if runtime.rank == 1:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, x, 0)]):
            work.wait()


def different_order(runtime):
    x, y = torch.ones(3, device=runtime.device), torch.ones(2, 2, device=runtime.device)
    for tensor in (x, y) if runtime.rank else (y, x):
        dist.all_reduce(tensor)


def host_tensor(runtime):
    dist.all_reduce(torch.ones(3))


def one_never_calls(runtime):
    if runtime.rank == 0:
        dist.all_reduce(torch.ones(3, device=runtime.device))


def not_waited_for(runtime):
    x = torch.ones(3, device=runtime.device)
    work = dist.all_reduce(x, async_op=True)
    assert x.isnan().all()
    return work


def written_before_the_wait(runtime):
    x = torch.ones(3, device=runtime.device)
    y = torch.empty(6, device=runtime.device)
    work = dist.all_gather_into_tensor(y, x, async_op=True)
    x.zero_()
    work.wait()


def reduces_bits(runtime):
    dist.all_reduce(torch.ones(3, dtype=torch.int32, device=runtime.device), dist.ReduceOp.BOR)


def unknown_dtype(runtime):
    dist.broadcast(torch.ones(3, dtype=torch.int16, device=runtime.device), 0)


def strided(runtime):
    dist.broadcast(torch.ones(3, 3, device=runtime.device)[:, 0], 0)


FAULTS = {
    both_send_first: r"ranks 0, 1.*transfer from \d to \d float32 \(3,\) .*both_send_first.*"
    r"no match within 2 s; 1 calls wait behind it",
    receives_without_a_send: r"rank 1: transfer from 0 to 1 float32 \(3,\).*no match",
    different_order: r"all_reduce SUM float32 \(\d.*different_order.*issued all_reduce SUM float32",
    host_tensor: r"all_reduce SUM of torch.float32 \(3,\).* is on the host, not on the device",
    one_never_calls: r"the first call, all_reduce.* waits for all ranks, but ranks 1 made none",
    not_waited_for: r"never waited for: all_reduce SUM float32 \(3,\) at .*not_waited_for:\d+",
    written_before_the_wait: r"input of all_gather_single.* changed before .* waited for",
    reduces_bits: "NCCL has no reduction",
    unknown_dtype: "int16.*NCCL does not know the dtype",
    strided: "must be contiguous",
}


def fault_message(runtime, fault):
    try:
        on_nccl_like_ranks(runtime, fault, seconds=2.0)
    except NcclLikeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_nccl_would_not_do_is_named(ranks, fault):
    found = [message for message in ranks.run(2, fault_message, fault) if message]
    assert found and any(re.search(FAULTS[fault], message) for message in found), found


def collectives(runtime):
    """Each collective beside its definition."""
    rank, size, device = runtime.rank, runtime.world_size, runtime.device
    own = torch.arange(4.0, device=device) + 10 * rank
    all_ranks = torch.stack([torch.arange(4.0) + 10 * r for r in range(size)]).to(device)
    whole, part = torch.empty(4 * size, device=device), torch.empty(4 // size, device=device)
    dist.all_gather_into_tensor(whole, own)
    dist.reduce_scatter_tensor(part, own.clone())
    swapped = torch.empty(4, device=device)
    dist.all_to_all_single(swapped, own)
    mean, summed = own.clone(), own.clone()
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    dist.reduce(summed, 1)
    listed = [torch.empty(4, device=device) for _ in range(size)]
    dist.all_gather(listed, own)
    gathered = [torch.empty(4, device=device) for _ in range(size)] if rank == 0 else None
    dist.gather(own, gathered, 0)
    mine = torch.empty(4, device=device)
    dist.scatter(mine, list(all_ranks) if rank == 1 else None, 1)
    bits = torch.tensor([rank == 0, False], device=device)
    dist.all_reduce(bits)
    dist.barrier()
    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(size)]
    assert torch.equal(whole.view(size, 4), all_ranks)
    assert torch.equal(part, all_ranks.sum(0).chunk(size)[rank])
    assert torch.equal(swapped, torch.cat([x.chunk(size)[rank] for x in all_ranks]))
    assert torch.equal(mean, all_ranks.mean(0))
    assert torch.equal(summed, all_ranks.sum(0)) or rank != 1
    assert torch.equal(torch.stack(listed), all_ranks)
    assert gathered is None or torch.equal(torch.stack(gathered), all_ranks)
    assert torch.equal(mine, all_ranks[rank])
    assert bits.tolist() == [True, False]


def test_collectives_are_what_they_say(ranks):
    ranks.run(2, on_nccl_like_ranks, collectives)


def test_tensors_of_host_and_device_do_not_meet():
    with track_host_tensors():
        host, device = torch.ones(3), torch.ones(3, device=DEVICE)
        assert (host.device, device.device) == (HOST, DEVICE)
        assert (device * 2.0 + torch.tensor(1.0)).device == DEVICE
        assert host.to(DEVICE).device == DEVICE and device.cpu().device == HOST
        assert host.device == HOST and torch.zeros_like(device).device == DEVICE
        assert torch.nn.Linear(2, 2, device="meta").to_empty(device=DEVICE).weight.device == DEVICE
        with pytest.raises(MixedTensorsError, match=r"aten.add.*host and device"):
            host + device
        with pytest.raises(MixedTensorsError, match=r"call .cpu\(\) first"):
            device.numpy()
    assert device.device == HOST


def whole_run(runtime, config):
    """Train, save, resume, evaluate, load and generate."""
    config = replace(config, strategy=resolve_degrees(config.strategy, runtime.world_size))
    loop.train(replace(config, steps=2), runtime)
    values = loop.train(config, runtime)
    reader = GenerateConfig(
        run_dir=config.run_dir, precision="fp64", strategy=config.strategy, device="cpu"
    )
    worker = load_trained_run(reader, runtime).worker
    written = sample_tokens(worker, [3, 1, 4], max_tokens=4, eot_id=-1, temperature=0.0)
    return values["eval_loss"], written


@pytest.mark.parametrize("strategy", ["fsdp 2", "pipeline 2"])
def test_a_run_is_trained_saved_resumed_and_used(ranks, tmp_path, strategy):
    def config(name):
        return TrainConfig(
            model=replace(tiny.LLAMA, vocab_size=0),
            data=tiny.text_data(tmp_path / "data"),
            precision="fp64",
            device="cpu",
            steps=3,
            batch_size=4,
            micro_batch_size=1,
            run_dir=str(tmp_path / name),
        )

    alone = prepare_training(config("alone"), 1)
    open_run_dir(alone)
    ((loss, written),) = ranks.run(1, whole_run, alone)
    two = prepare_training(replace(config("two"), strategy=tiny.TWO_RANKS[strategy]), 2)
    open_run_dir(two)
    for found_loss, found in ranks.run(2, on_nccl_like_ranks, whole_run, two):
        assert found_loss == pytest.approx(loss, abs=1e-10)
        assert found == written
