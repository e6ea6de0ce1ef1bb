"""Layers of a Transformer block; each computes in its input's dtype, independent of ranks."""

# B batch, S sequence, T memory (source) sequence, D width, H query heads, G key/value heads,
# K width of a head, F feed-forward width, P patches, C channels. Global sizes, also when sharded.

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.train import (
    ModelConfig,
    attention_biases,
    has_key_bias,
    has_window,
    head_width_of,
    is_gated,
)
from trainer.nn.cache import AttentionCache, BlockCache
from trainer.nn.local_layer import LocalLayer
from trainer.nn.packed_attention import PackedAttention
from trainer.nn.rotary import apply_rope
from trainer.nn.sequence import Bias, SequenceInfo, Sequences

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Linear(LocalLayer, nn.Linear):
    """A linear layer that casts its weight to the input's dtype (fp32 weights, bf16 compute)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.local_part("weight").to(input.dtype), self.cast_bias(input))

    def cast_bias(self, input: Tensor) -> Tensor | None:
        """Return the bias in the input's dtype; None = there is none."""
        bias = self.local_part("bias")
        return None if bias is None else bias.to(input.dtype)


class Embedding(LocalLayer, nn.Embedding):
    """Embedding table; vectors are looked up, then cast to `dtype` (None = the table's own)."""

    def forward(self, input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return F.embedding(input, self.local_part("weight")).to(dtype or self.weight.dtype)


class Norm(nn.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) over the width."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rms = config.norm == "rmsnorm"
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.width))
        has_bias = config.bias and not self.rms
        self.bias = nn.Parameter(torch.empty(config.width)) if has_bias else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        weight = self.weight.to(x_BSD.dtype)
        if self.rms:
            return F.rms_norm(x_BSD, weight.shape, weight, self.eps)
        bias = None if self.bias is None else self.bias.to(x_BSD.dtype)
        return F.layer_norm(x_BSD, weight.shape, weight, bias, self.eps)


class HeadNorm(nn.Module):
    """RMSNorm of each head of the queries or keys, with one weight for all (arXiv 2010.04245)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(head_width_of(config)))

    def forward(self, x_BSHK: Tensor) -> Tensor:
        return F.rms_norm(x_BSHK, self.weight.shape, self.weight.to(x_BSHK.dtype), self.eps)


class WidthNorm(LocalLayer):
    """RMSNorm of all heads of the queries or keys together, as in OLMo 2 (arXiv 2501.00656)."""

    def __init__(self, config: ModelConfig, heads: int):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(heads * head_width_of(config)))

    def forward(self, x_BSD: Tensor) -> Tensor:
        precise_BSD = x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32))
        mean_BS1 = self.mean_over_parts(precise_BSD.square().mean(-1, keepdim=True))
        scale_BS1 = (mean_BS1 + self.eps).rsqrt()
        return (precise_BSD * scale_BS1 * self.local_part("weight")).to(x_BSD.dtype)

    def mean_over_parts(self, mean: Tensor) -> Tensor:
        """Return the mean over all features, of which this layer may hold a part."""
        return mean


def _to_signed(value: int) -> int:
    """Return the int64 with the same bits as a 64-bit unsigned value."""
    return value - (1 << 64) if value >= 1 << 63 else value


# 32 bits of the golden ratio: torch.compile folds counter × stride into an index, which must not
# overflow. The other two constants are those of SplitMix64.
_STRIDE = 0x9E3779B9
_MIX_1, _MIX_2 = map(_to_signed, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix_bits(bits: Tensor, shift: int) -> Tensor:
    # torch's right shift is arithmetic; SplitMix64 needs a logical one.
    return bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))


def random_bits(seeds_B: Tensor, site: int | Tensor, counter_N: Tensor) -> Tensor:
    """Return 64 random bits (B,N) per counter value, by SplitMix64's mixer (Steele et al. 2014)."""
    bits = (seeds_B + site)[:, None] + counter_N * _STRIDE
    bits = _mix_bits(bits, 30) * _MIX_1
    bits = _mix_bits(bits, 27) * _MIX_2
    return _mix_bits(bits, 31)


def keep_mask(
    seeds_B: Tensor, site: int | Tensor, width: int, share: float, places_S: Tensor
) -> Tensor:
    """Return dropout's mask (B,S,D), True = keep: a function of sample seed, site and position.

    Each counter value gives four 16-bit random numbers. There is no generator state, so the mask
    does not depend on ranks, micro-batches, resuming or recomputation. `places_S` are the
    positions of the local rows.
    """
    S, D = len(places_S), width
    row = (D + 3) // 4  # counter values per position
    counter = (places_S[:, None] * row + torch.arange(row, device=seeds_B.device)).flatten()
    bits = random_bits(seeds_B, site, counter)
    draws = bits.view(torch.int16).view(-1, S, 4 * row)[:, :, :D]
    return draws >= round(share * 65536) - 32768


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) with a mask that depends only on the sample's seed."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share
        # Distinguishes the dropout layers of a model; set from the module's name. A tensor, since
        # with a Python int each block would be recompiled.
        self.site = torch.zeros((), dtype=torch.int64, device="cpu")

    def forward(self, x_BSD: Tensor, stream: SequenceInfo) -> Tensor:
        if not self.training or self.share == 0.0 or stream.seeds_B is None:
            return x_BSD
        width = x_BSD.shape[-1]
        keep = keep_mask(stream.seeds_B, self.site, width, self.share, stream.positions_S)
        # `where` saves one byte per element for the backward; a product would save a float mask.
        return torch.where(keep, x_BSD * (1.0 / (1.0 - self.share)), 0.0)


class Attention(nn.Module):
    """Multi-head attention, grouped-query when kv_heads < heads (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_width = head_width_of(config)
        groups = config.kv_heads or config.heads
        query_width, group_width = config.heads * self.head_width, groups * self.head_width
        bias, output_bias = attention_biases(config)
        self.query = Linear(config.width, query_width, bias=bias)
        self.key = Linear(config.width, group_width, bias=has_key_bias(config))
        self.value = Linear(config.width, group_width, bias=bias)
        self.output = Linear(query_width, config.width, bias=output_bias)
        head, width = config.qk_norm == "head", config.qk_norm == "width"
        self.query_norm = HeadNorm(config) if head else nn.Identity()
        self.key_norm = HeadNorm(config) if head else nn.Identity()
        self.queries_norm = WidthNorm(config, config.heads) if width else nn.Identity()
        self.keys_norm = WidthNorm(config, groups) if width else nn.Identity()
        # torch's attention multiplies the scores by 1/√K.
        self.scale = config.attention_scale * math.sqrt(self.head_width)

    def _split_heads(self, x_BSD: Tensor) -> Tensor:
        # The number of heads is inferred from the tensor, so that a shard of the heads works too.
        return x_BSD.unflatten(-1, (-1, self.head_width))

    def _query_heads(self, x_BSD: Tensor) -> Tensor:
        query_BSHK = self.query_norm(self._split_heads(self.queries_norm(self.query(x_BSD))))
        return query_BSHK * self.scale if self.scale else query_BSHK

    def _key_heads(self, x_BSD: Tensor) -> Tensor:
        return self.key_norm(self._split_heads(self.keys_norm(self.key(x_BSD))))

    def forward(
        self, x_BSD: Tensor, stream: SequenceInfo, cache: AttentionCache | None = None
    ) -> Tensor:
        """Apply self-attention to x (B,S,D)."""
        query_BSHK, key_BSGK = self._query_heads(x_BSD), self._key_heads(x_BSD)
        if stream.rope is not None:
            query_BSHK, key_BSGK = (
                apply_rope(query_BSHK, stream.rope),
                apply_rope(key_BSGK, stream.rope),
            )
        key_BGSK = key_BSGK.transpose(1, 2)
        value_BGSK = self._split_heads(self.value(x_BSD)).transpose(1, 2)
        packed = stream.packed
        needs_mask = stream.hides_keys or stream.relative is not None
        causal = stream.causal and (packed is not None or not needs_mask)
        if cache is not None:
            start, S = cache.length, query_BSHK.shape[1]
            key_BGSK, value_BGSK = cache.append(key_BGSK, value_BGSK)
            if causal and start and S > 1:  # the cached tokens, and those of these before each
                mask_SC = torch.ones(S, start + S, dtype=torch.bool, device=x_BSD.device)
                stream = replace(stream, mask=mask_SC.tril(start)[None, None])
            causal = causal and start == 0  # a single later token attends to all cached ones
        mask = stream.mask if stream.biased_mask is None else stream.biased_mask
        return self._attend_global(
            query_BSHK, key_BGSK, value_BGSK, stream, mask, causal, stream.relative, packed
        )

    def cross_attention(
        self,
        x_BSD: Tensor,
        memory_BTD: Tensor,
        memory: SequenceInfo,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Apply cross-attention from x (B,S,D) to the encoder's memory (B,T,D)."""
        if cache is not None and cache.key is not None and cache.value is not None:
            key_BGTK, value_BGTK = cache.key, cache.value
        else:
            key_BGTK = self._key_heads(memory_BTD).transpose(1, 2)
            value_BGTK = self._split_heads(self.value(memory_BTD)).transpose(1, 2)
            if cache is not None:
                cache.key, cache.value = key_BGTK, value_BGTK
        return self._attend_global(
            self._query_heads(x_BSD), key_BGTK, value_BGTK, memory, memory.mask, causal=False
        )

    def _attend_global(
        self,
        query_BSHK: Tensor,
        key_BGSK: Tensor,
        value_BGSK: Tensor,
        keys: SequenceInfo,
        mask: Tensor | None,
        causal: bool,
        bias: Bias | None = None,
        packed: PackedAttention | None = None,
    ) -> Tensor:
        query_BHSK, visible = query_BSHK.transpose(1, 2), keys.visible_mask
        if keys.context.shares:
            mixed_BHSK = keys.context.attend_global(
                query_BHSK, key_BGSK, value_BGSK, keys.total, visible, causal, bias, packed
            )
            return self.output(mixed_BHSK.transpose(1, 2).flatten(2))
        if packed is not None:
            mixed_BHSK = packed.attend(query_BHSK, key_BGSK, value_BGSK, causal)
            return self.output(mixed_BHSK.transpose(1, 2).flatten(2))
        group = query_BHSK.shape[1] // key_BGSK.shape[1]
        if group > 1 and mask is not None:
            # No fused CUDA kernel supports both a mask and grouped heads: repeat keys and values.
            key_BGSK = key_BGSK.repeat_interleave(group, dim=1)
            value_BGSK = value_BGSK.repeat_interleave(group, dim=1)
        mixed_BHSK = F.scaled_dot_product_attention(
            query_BHSK,
            key_BGSK,
            value_BGSK,
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=group > 1 and mask is None,
        )
        return self.output(mixed_BHSK.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers around an activation; or three if it is gated."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = None
        if is_gated(config):
            self.gate = Linear(config.width, config.ffn_width, bias=config.bias)
        self.up = Linear(config.width, config.ffn_width, bias=config.bias)
        self.down = Linear(config.ffn_width, config.width, bias=config.bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x_BSD)))
        return self.down(self.activation(self.gate(x_BSD)) * self.up(x_BSD))


def norm_at(config: ModelConfig, *placements: str) -> nn.Module:
    """Build a norm if `model.norm_placement` is one of these, otherwise the identity."""
    return Norm(config) if config.norm_placement in placements else nn.Identity()


def final_norm(config: ModelConfig) -> nn.Module:
    """Build the norm behind the last block; under `post` that block has normalised its output."""
    return norm_at(config, "pre", "output", "sandwich")


class Block(nn.Module):
    """Self-attention, cross-attention (in a decoder with memory), feed-forward; each residual.

    A branch f has norms by `norm_placement`: pre, x + f(norm(x)); post, norm(x + f(x)), as in the
    original Transformer (arXiv 1706.03762); output, x + norm(f(x)), OLMo 2 (arXiv 2501.00656);
    sandwich, x + norm(f(norm(x))), Gemma 3 (arXiv 2503.19786).

    Input and output are (x, memory). In the encoder of an encoder-decoder, `memory` carries the
    decoder's embedded target through unchanged. The encoder's last block (`turns`) applies the
    final norm to its output, gathers the full sequence and swaps the two, so that a pipeline can
    split the model between any two blocks.
    """

    def __init__(
        self,
        config: ModelConfig,
        stream: str,
        cross: bool = False,
        is_last_encoder_block: bool = False,
        windowed: bool = False,
    ):
        super().__init__()
        self.stream = stream  # source | target: the sequence of x
        self.windowed = windowed  # its attention has a sliding window
        self.attention_norm = norm_at(config, "pre", "sandwich")
        self.attention = Attention(config)
        self.attention_output_norm = norm_at(config, "output", "sandwich")
        self.attention_sum_norm = norm_at(config, "post")
        self.cross_attention = None
        if cross:
            self.cross_norm = norm_at(config, "pre", "sandwich")
            self.cross_attention = Attention(config)
            self.cross_output_norm = norm_at(config, "output", "sandwich")
            self.cross_sum_norm = norm_at(config, "post")
        self.feed_forward_norm = norm_at(config, "pre", "sandwich")
        self.feed_forward = FeedForward(config)
        self.feed_forward_output_norm = norm_at(config, "output", "sandwich")
        self.feed_forward_sum_norm = norm_at(config, "post")
        self.turn_norm = final_norm(config) if is_last_encoder_block else None
        self.attention_dropout = Dropout(config.dropout)
        self.cross_dropout = Dropout(config.dropout) if cross else None
        self.feed_forward_dropout = Dropout(config.dropout)

    def forward(
        self,
        x_BSD: Tensor,
        memory_BTD: Tensor | None,
        streams: Sequences,
        cache: BlockCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        own = streams[self.stream]
        seen = own if own.windowed is None or not self.windowed else own.windowed
        branch_BSD = self.attention(
            own.gather_local(self.attention_norm(x_BSD)),
            seen,
            cache.attention if cache else None,
        )
        branch_BSD = self.attention_output_norm(branch_BSD)
        x_BSD = self.attention_sum_norm(x_BSD + self.attention_dropout(branch_BSD, own))
        if self.cross_attention and self.cross_dropout:
            assert memory_BTD is not None
            branch_BSD = self.cross_attention.cross_attention(
                own.gather_local(self.cross_norm(x_BSD)),
                memory_BTD,
                streams["source"],
                cache.cross if cache else None,
            )
            branch_BSD = self.cross_output_norm(branch_BSD)
            x_BSD = self.cross_sum_norm(x_BSD + self.cross_dropout(branch_BSD, own))
        branch_BSD = self.feed_forward(own.gather_local(self.feed_forward_norm(x_BSD)))
        branch_BSD = self.feed_forward_output_norm(branch_BSD)
        x_BSD = self.feed_forward_sum_norm(x_BSD + self.feed_forward_dropout(branch_BSD, own))
        if self.turn_norm is not None:
            assert memory_BTD is not None
            return memory_BTD, own.gather_local(self.turn_norm(x_BSD))
        return x_BSD, memory_BTD


def build_blocks(config: ModelConfig) -> list[Block]:
    """Return the blocks of a model in order, those of an encoder first."""
    layers = range(config.layers)
    if config.family == "encoder":
        return [Block(config, "source") for _ in layers]
    if config.family == "decoder":
        return [Block(config, "target", windowed=has_window(config, i)) for i in layers]
    depth = config.encoder_layers or config.layers
    encoder = [Block(config, "source", is_last_encoder_block=i == depth - 1) for i in range(depth)]
    return encoder + [Block(config, "target", cross=True) for _ in range(config.layers)]
