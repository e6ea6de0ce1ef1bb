"""A decoder whose middle blocks process pooled tokens: no token attends to a later one."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.compress.compression import Compression
from trainer.compress.sequence_reduction import LengthenText, ShortenText
from trainer.config.train import CompressConfig
from trainer.model import Transformer
from trainer.nn.cache import DecodingCache
from trainer.nn.flops import flops_per_sample
from trainer.nn.init import init_rows
from trainer.nn.sequence import FullContext, FullSequence, SequenceInfo
from trainer.verify.cases import FAMILIES, make_batch, scale_down

LENGTH, BLOCKS = 12, 6


def built(stride: int, family: str = "decoder (Llama)") -> Transformer:
    config = replace(scale_down(FAMILIES[family], stages=BLOCKS - 1), dropout=0.0)
    model = Transformer(config, torch.float64).double()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(init_rows(config, 0, name, parameter.shape, 0, len(parameter)) * 4)
    Compression(CompressConfig(pool_after=2, pool_stride=stride)).reshape_model(model)
    return model


def stream_of(documents=None) -> SequenceInfo:
    places = torch.arange(LENGTH)
    layout, context = FullSequence(), FullContext()
    return SequenceInfo(LENGTH, LENGTH, layout, context, True, places, documents_BS=documents)


@pytest.mark.parametrize("family", ["decoder (Llama)", "decoder (GPT-2)"])
@pytest.mark.parametrize("stride", [2, 3, 5])
def test_no_token_sees_a_later_one_or_another_documents(stride, family):
    """Check the gradients of a position's logits with respect to the vectors of all tokens."""
    model = built(stride, family)
    assert model.block_lengths(LENGTH)[1:5] == [12, -(-12 // stride), -(-12 // stride), 12]
    batch = make_batch(model.config, 1, 0)
    flow, _ = model(batch, blocks=["0"])[:2]
    x_BSD = flow.detach().requires_grad_()
    logits = model(batch, flow=(x_BSD, None, None), blocks=list(model.blocks)[1:])
    documents = batch["documents"]
    for position in range(LENGTH):
        own = logits[:, position].square().sum()
        (seen_BSD,) = torch.autograd.grad(own, x_BSD, retain_graph=True)
        seen = seen_BSD.abs().sum(-1) > 0
        allowed = documents == documents[:, position : position + 1]
        allowed[:, position + 1 :] = False
        assert not (seen & ~allowed).any()
        assert torch.equal(seen, allowed)  # and depends on all others, through groups


@pytest.mark.parametrize("stride", [2, 3])
def test_groups_are_shifted_means_and_every_position_gets_the_newest(stride):
    x = torch.randn(2, LENGTH, 4, dtype=torch.float64)
    documents = (torch.arange(LENGTH) >= torch.tensor([[7], [12]])).long()
    stream = stream_of(documents)
    flow = ShortenText(stride)((x, None, None), stream, True, {})
    behind = ShortenText(stride).sequence_after(stream, True)
    for b in range(2):
        for j, group in enumerate(flow[0][b]):
            last = j * stride
            members = [
                i
                for i in range(max(0, last - stride + 1), last + 1)
                if documents[b, i] == documents[b, last]
            ]
            torch.testing.assert_close(group, x[b, members].mean(0))
    long, nothing, _ = LengthenText(stride)((flow[0], x, None), behind, True, {})
    assert nothing is None
    for b in range(2):
        for i in range(LENGTH):
            newest = i // stride
            same = documents[b, newest * stride] == documents[b, i]
            torch.testing.assert_close(long[b, i], x[b, i] + flow[0][b, newest] * same)


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("prompt", [1, 4, 5])
def test_cached_decoding_equals_one_forward(stride, prompt):
    model = built(stride).eval()
    tokens = make_batch(model.config, 2, 0)["tokens"]
    cache = DecodingCache(model, LENGTH)
    bounds = [(0, prompt), *((i, i + 1) for i in range(prompt, LENGTH))]
    parts = []
    for begin, end in bounds:
        likes = [model.flow_like({"tokens": tokens[:, begin:end]}, i, cache) for i in range(1, 6)]
        parts.append(model({"tokens": tokens[:, begin:end]}, cache=cache))
        groups = len([i for i in range(begin, end) if i % stride == 0])
        lengths = [like[0].shape[1] for like in likes]
        assert lengths == [end - begin, groups, groups, end - begin, end - begin]
        assert [like[1] is None for like in likes] == [True, False, False, True, True]
    torch.testing.assert_close(torch.cat(parts, dim=1), model({"tokens": tokens}))


def test_an_hourglass_can_be_split_between_any_two_blocks():
    model = built(3)
    batch, flow = make_batch(model.config, 1, 0), None
    for name in model.blocks:
        flow = model(batch, flow=flow, blocks=[name])
        if int(name) < model.depth - 1:
            like = model.flow_like(batch, int(name) + 1)
            shapes = [None if tensor is None else tensor.shape for tensor in like]
            assert [None if tensor is None else tensor.shape for tensor in flow] == shapes
    torch.testing.assert_close(flow, model(batch))


def test_the_formula_counts_an_hourglass_models_flops():
    with torch.device("meta"):
        model = Transformer(replace(scale_down(FAMILIES["decoder (GPT-2)"], stages=5), dropout=0.0))
    Compression(CompressConfig(pool_after=2, pool_stride=4)).reshape_model(model)
    inputs = {"tokens": torch.zeros(8, LENGTH, dtype=torch.int64, device="meta")}
    with FlopCounterMode(display=False) as counter:
        model(inputs).sum().backward()
    flops = flops_per_sample(model.config, LENGTH, 0, model.block_lengths(LENGTH))
    assert counter.get_total_flops() == 8 * flops
