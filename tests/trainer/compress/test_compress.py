"""Compare sequence reduction and quantization with the papers and with plain code."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conf.validation.compression import compress_problems
from parallel.strategy import StrategyConfig
from trainer import loop
from trainer.compress.compression import Compression
from trainer.compress.quantized_linear import (
    CompressedLinear,
    QuantizationSpec,
    fake_quantize,
    nm_pruned,
    quantize_to_integers,
)
from trainer.compress.sequence_reduction import DropPatches, MergeTokens, PoolImage, PoolText
from trainer.config.train import CompressConfig, TrainConfig
from trainer.model import Transformer
from trainer.nn.cache import DecodingCache
from trainer.nn.flops import flops_per_sample
from trainer.nn.init import init_rows
from trainer.nn.sequence import FullContext, FullSequence, SequenceInfo
from trainer.verify.cases import FAMILIES, make_batch, scale_down

VIT, TRANSLATOR = FAMILIES["encoder (ViT)"], FAMILIES["encoder-decoder"]
SIX = 6  # blocks; an encoder-decoder gets four


def stream_of(length: int, valid=None, seeds=None) -> SequenceInfo:
    places = torch.arange(length)
    return SequenceInfo(
        length, length, FullSequence(), FullContext(), False, places, valid_BS=valid, seeds_B=seeds
    )


def built(family, compress: CompressConfig, **changes) -> Transformer:
    config = replace(scale_down(family, stages=SIX), dropout=0.0, **changes)
    model = Transformer(config, torch.float64).double()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(init_rows(config, 0, name, parameter.shape, 0, len(parameter)) * 4)
    Compression(compress).reshape_model(model)
    return model


def merged_by_hand(x, r: int, kept: int):
    """Merge tokens of one sequence as in the paper, one vector after another."""
    vectors, rest = list(x), range(kept, len(x))
    from_here, to_there = list(rest)[::2], list(rest)[1::2]
    unit = F.normalize(x, dim=-1)
    best = {a: max(to_there, key=lambda b, a=a: float(unit[a] @ unit[b])) for a in from_here}
    likest = sorted(from_here, key=lambda a: -float(unit[a] @ unit[best[a]]))[:r]
    joined = {b: [b, *[a for a in likest if best[a] == b]] for b in to_there}
    stay = [i for i in range(len(x)) if i not in likest]
    means = [torch.stack([vectors[j] for j in joined.get(i, [i])]).mean(0) for i in stay]
    return torch.stack(means), [len(joined.get(i, [i])) for i in stay]


@pytest.mark.parametrize(("length", "r", "kept"), [(17, 5, 1), (16, 8, 0), (9, 0, 1), (7, 2, 0)])
def test_merging_equals_the_papers(length, r, kept):
    x = torch.randn(3, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(r))
    merge = MergeTokens(r, kept)
    left, marks = merge.resize_sequence(x, stream_of(length), training=True)
    assert left.shape[1] == marks.shape[1] == merge.output_length(length, True) == length - r
    for own, sizes, given in zip(left, marks[..., 0], x, strict=True):
        vectors, counts = merged_by_hand(given, r, kept)
        torch.testing.assert_close(own, vectors)
        assert sizes.tolist() == counts
    assert marks.sum(1).tolist() == [[length, length * (length - 1) // 2]] * 3


def test_padding_is_never_merged_and_changes_nothing():
    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(20) < torch.tensor([[9], [20]])
    merge = MergeTokens(6, 0)
    left, marks = merge.resize_sequence(x, stream_of(20, valid), training=True)
    alone, own = merge.resize_sequence(x[:1, :9], stream_of(9), training=True)
    assert (marks[0, :, 0] > 0).sum() == 9 - 4  # at most half of the valid vectors
    torch.testing.assert_close(left[:1, :5], alone)
    assert torch.equal(marks[:1, :5], own)
    assert torch.equal(left[0, 5:], torch.zeros(9, 8))


def test_merging_identical_vectors_changes_no_logit():
    """Proportional attention: merging identical vectors changes no logit."""
    plain, merging = built(VIT, CompressConfig()), built(VIT, CompressConfig(merge=8))
    merging.load_state_dict(plain.state_dict())
    batch = make_batch(plain.config, 0, 0)
    for model in (plain, merging):
        model.embed.positions.weight.data.zero_()
    batch["images"] = batch["images"][:, :, :2, :2].repeat(1, 1, 4, 4)  # identical patches
    torch.testing.assert_close(merging(batch), plain(batch))


def test_pooling_averages_squares_of_patches_and_valid_tokens():
    x = torch.arange(2 * 10.0).view(1, 10, 2)
    left, marks = PoolImage(2, side=3, kept=1).resize_sequence(x, stream_of(10), training=True)
    grid = x[0, 1:].view(3, 3, 2)
    squares = [grid[:2, :2], grid[:2, 2:], grid[2:, :2], grid[2:, 2:]]
    torch.testing.assert_close(
        left[0, 1:], torch.stack([s.reshape(-1, 2).mean(0) for s in squares])
    )
    assert marks is None and torch.equal(left[0, 0], x[0, 0])
    valid = torch.arange(10)[None] < 5
    left, marks = PoolText(2).resize_sequence(x, stream_of(10, valid), training=True)
    torch.testing.assert_close(
        left[0, :3], torch.stack([x[0, :2].mean(0), x[0, 2:4].mean(0), x[0, 4]])
    )
    assert marks[0].tolist() == [[2, 1], [2, 5], [1, 4], [0, 0], [0, 0]]


def test_dropped_patches_depend_on_the_sample_alone():
    x, seeds = torch.randn(4, 17, 8), torch.tensor([3, 1, 4, 1])
    drop = DropPatches(0.5, kept=1)
    left, _ = drop.resize_sequence(x, stream_of(17, seeds=seeds), training=True)
    assert left.shape[1] == drop.output_length(17, True) == 9
    assert torch.equal(left[:, 0], x[:, 0])
    again, _ = drop.resize_sequence(x[2:], stream_of(17, seeds=seeds[2:]), training=True)
    assert torch.equal(left[2:], again)
    places = [[x[i].tolist().index(row) for row in left[i].tolist()] for i in range(4)]
    assert all(own == sorted(own) for own in places)
    assert places[1] == places[3] != places[0]
    assert drop.resize_sequence(x, stream_of(17, seeds=seeds), training=False)[0] is x


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_fake_quantization_equals_torchs(bits):
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(bits))
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1) / top
    zero = torch.zeros(6, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -top, top)
    torch.testing.assert_close(fake_quantize(x, bits), theirs)
    assert fake_quantize(x, bits).unique().numel() <= 6 * (2 * top + 1)


def test_the_forward_multiplies_integers_and_the_gradient_is_straight_through():
    layer = CompressedLinear(32, 16).double()
    layer.lens = QuantizationSpec(bits=8, input_bits=8)
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    (qx, sx), (qw, sw) = (
        quantize_to_integers(x.detach(), 8),
        quantize_to_integers(layer.weight.detach(), 8),
    )
    exact = (qx.to(torch.int32) @ qw.to(torch.int32).T).double() * sx * sw.T
    torch.testing.assert_close(y, exact + layer.bias, rtol=0, atol=1e-12)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ (qw * sw))
    torch.testing.assert_close(layer.weight.grad, grad.T @ (qx * sx))
    assert torch.equal(layer(torch.zeros(1, 32, dtype=torch.float64))[0], layer.bias)


def test_the_largest_two_of_four_are_retained():
    weight = torch.tensor([[1.0, -4, 3, 2, 9, 8, 7, -8.5], [5, 5, 5, 5, 1, 2, 3, 4]])
    expected = [[0, -4, 3, 0, 9, 0, 0, -8.5], [5, 5, 0, 0, 0, 0, 3, 4]]
    assert nm_pruned(weight, 2, 4).tolist() == expected
    layer = CompressedLinear(8, 2, bias=False)
    layer.weight.data.copy_(weight)
    compression = Compression(CompressConfig(sparse_n=2, sparse_start=0.5))
    layer.lens = compression.lens
    for step, seen in ((0, weight.tolist()), (4, weight.tolist()), (5, expected), (9, expected)):
        compression.prepare_step(step, 10)
        assert layer(torch.eye(8)).T.tolist() == seen


@pytest.mark.parametrize("compress", [CompressConfig(merge=3), CompressConfig(pool_after=1)])
def test_decoding_with_a_cache_reads_the_shortened_memory(compress):
    model = built(TRANSLATOR, compress).eval()
    batch = make_batch(model.config, 2, 0)
    whole_logits = model(batch)
    assert not torch.allclose(whole_logits, built(TRANSLATOR, CompressConfig()).eval()(batch))
    cache = DecodingCache(model, capacity=12)
    shared = {k: v for k, v in batch.items() if k.startswith("source")}
    bounds = ((0, 9), (9, 10), (10, 11), (11, 12))
    parts = [model(shared | {"tokens": batch["tokens"][:, i:j]}, cache=cache) for i, j in bounds]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_logits)


@pytest.mark.parametrize("family", [VIT, TRANSLATOR])
def test_a_shortened_model_can_be_split_between_any_two_blocks(family):
    compress = CompressConfig(merge=1, pool_after=2)
    model = built(family, compress)
    batch, flow = make_batch(model.config, 1, 0), None
    lengths = set()
    for name in model.blocks:
        flow = model(batch, flow=flow, blocks=[name])
        if int(name) < model.depth - 1:
            like = model.flow_like(batch, int(name) + 1)
            for tensor, expected in zip(flow, like, strict=True):
                assert (tensor is None) == (expected is None)
                if tensor is not None:
                    assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
            lengths.add(flow[0].shape[1])
    assert len(lengths) > 2
    torch.testing.assert_close(flow, model(batch))


def test_the_formula_counts_a_pooled_models_flops():
    with torch.device("meta"):
        model = Transformer(replace(scale_down(VIT, stages=SIX), dropout=0.0))
    Compression(CompressConfig(pool_after=2)).reshape_model(model)
    inputs = {"images": torch.empty(8, 3, 8, 8, device="meta")}
    with FlopCounterMode(display=False) as counter:
        model(inputs).sum().backward()
    lengths = model.block_lengths(0)
    assert lengths[1:3] == [17, 5]
    assert counter.get_total_flops() == 8 * flops_per_sample(model.config, 0, 0, lengths)


class Operations(TorchDispatchMode):
    """Record the names of all dispatched operations."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


class Nothing(Compression):
    """A compression whose methods do nothing, as reference."""

    def reshape_model(self, model):
        pass

    def wrap_loss(self, loss_sum, divergence_sum, model):
        return lambda logits, targets, inputs, count, **options: loss_sum(
            logits, targets, count, **options
        )

    def prepare_step(self, step, steps):
        pass


def operations(kind: type[Compression], compress: CompressConfig, runtime, family) -> list[str]:
    """Return the dispatched operations of two full training steps."""
    config = TrainConfig(model=scale_down(family, stages=3), steps=2, compress=compress)
    compression = kind(compress)
    with mock.patch("trainer.loop.Compression", lambda _: compression):
        state = loop.start_run(config, runtime)
    batch = make_batch(config.model, 0, 0)
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    with Operations() as counted:
        for _ in range(2):
            loop.take_step(config, state, [batch])
    return counted.names


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_nothing_compressed_costs_nothing(runtime, family):
    none = operations(Compression, CompressConfig(), runtime, family)
    assert none == operations(Nothing, CompressConfig(), runtime, family)
    rounded_too = operations(Compression, CompressConfig(bits=8), runtime, family)
    assert len(rounded_too) > len(none) > 500


DECODER = FAMILIES["decoder (Llama)"]
IMAGES = replace(VIT, image_size=28, patch_size=7, layers=4, width=128, heads=4)
BAD = {
    "compress.merge=4 would let a token see": (CompressConfig(merge=4), DECODER, {}),
    "set compress.merge=4 or less": (CompressConfig(merge=5), IMAGES, {}),
    "set compress.pool_after=3 or less": (CompressConfig(pool_after=4), IMAGES, {}),
    "leaves none of model.layers=4 to work on pooled tokens, as many blocks in front of them as "
    "behind; set compress.pool_after=1": (
        CompressConfig(pool_after=2),
        replace(DECODER, layers=4),
        {},
    ),
    "set compress.pool_stride=16 or less": (
        CompressConfig(pool_after=1, pool_stride=17),
        replace(DECODER, layers=4, max_positions=16),
        {},
    ),
    "set compress.pool_stride=4 or less": (
        CompressConfig(pool_after=1, pool_stride=5),
        IMAGES,
        {},
    ),
    "set one of them to 0": (CompressConfig(pool_after=1, drop=0.5), IMAGES, {}),
    "set compress.drop=0": (CompressConfig(drop=0.5), TRANSLATOR, {}),
    "set strategy.context=1, or compress.merge=0": (
        CompressConfig(merge=1),
        IMAGES,
        {"context": 2},
    ),
    "compress.group=48 does not divide the inputs of model.width=128 and 4 heads of 32 and "
    "model.ffn_width=512; try compress.group=32": (
        CompressConfig(bits=4, group=48),
        IMAGES,
        {},
    ),
    "on each of strategy.tensor=4 ranks; try compress.group=32": (
        CompressConfig(bits=4, group=64),
        IMAGES,
        {"tensor": 4},
    ),
    "set compress.sparse_n=2, or 0": (CompressConfig(sparse_n=4), IMAGES, {}),
}


@pytest.mark.parametrize("message", BAD)
def test_an_unsupported_compression_is_one_message(message):
    compress, model, degrees = BAD[message]
    (found,) = compress_problems(compress, model, StrategyConfig(**degrees))
    assert message in found


def test_a_supported_compression_is_accepted():
    strategy = StrategyConfig(tensor=4, pipeline=2)
    stack = CompressConfig(merge=4, bits=4, group=32, sparse_n=2)
    assert compress_problems(stack, IMAGES, strategy) == []
    assert compress_problems(replace(stack, merge=0, group=8), DECODER, StrategyConfig()) == []
    assert compress_problems(CompressConfig(pool_after=1, merge=9), TRANSLATOR, strategy) == []
