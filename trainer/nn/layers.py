"""Layers of a Transformer block; each computes in its input's dtype, independent of ranks."""

# B batch, S sequence, T memory (source) sequence, D width, H query heads, G key/value heads,
# K width of a head, F feed-forward width, P patches, C channels. Global sizes, also when sharded.

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.train import ModelConfig, attention_biases
from trainer.nn.sequence import SequenceInfo, Sequences

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class AttentionCache:
    """Key/value cache of the tokens processed so far, (B,G,S,K); holds up to `capacity` tokens."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def append(self, key_BGSK: Tensor, value_BGSK: Tensor) -> tuple[Tensor, Tensor]:
        """Append the given keys and values, and return all cached ones."""
        B, G, S, K = key_BGSK.shape
        if self.key is None or self.value is None:
            self.key = key_BGSK.new_empty(B, G, self.capacity, K)
            self.value = value_BGSK.new_empty(B, G, self.capacity, K)
        end = self.length + S
        self.key[:, :, self.length : end] = key_BGSK
        self.value[:, :, self.length : end] = value_BGSK
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]

    def reorder(self, rows_B: Tensor) -> None:
        """Select the given rows of the batch: the beams that beam search continues."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[rows_B], self.value[rows_B]


@dataclass
class BlockCache:
    """Key/value caches of one decoder block during generation."""

    attention: AttentionCache
    cross: AttentionCache  # keys and values of the memory, set by the first token


class Linear(nn.Linear):
    """A linear layer that casts its weight to the input's dtype (fp32 weights, bf16 compute)."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class Embedding(nn.Embedding):
    """Embedding table; vectors are looked up, then cast to `dtype` (None = the table's own)."""

    def forward(self, input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return F.embedding(input, self.weight).to(dtype or self.weight.dtype)


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


def rotary_angles(positions_BS: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple:
    """Return cosine and sine of the rotary embedding (arXiv 2104.09864), each (B,S,1,K/2).

    `rope_scaling` lowers the low frequencies as Llama 3.1 does, to extend a context of 8,192 tokens
    by that factor (arXiv 2407.21783).
    """
    head_width = config.head_width or config.width // config.heads
    half = torch.arange(0, head_width, 2, device=positions_BS.device, dtype=dtype)
    frequency = 1.0 / config.rope_theta ** (half / head_width)
    if config.rope_scaling != 1.0:
        turns = 8192 * frequency / (2 * torch.pi)  # rotations within the original context
        blend = ((turns - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)
        frequency = frequency * (blend + (1.0 - blend) / config.rope_scaling)
    angle = positions_BS[:, :, None, None].to(dtype) * frequency
    return angle.cos(), angle.sin()


def apply_rope(x_BSHK: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (k, k + K/2) of a head by its position's angle, in the angles' dtype."""
    cos, sin = rope
    left, right = x_BSHK.chunk(2, dim=-1)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return turned.to(x_BSHK.dtype)


class Attention(nn.Module):
    """Multi-head attention, grouped-query when kv_heads < heads (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_width = config.head_width or config.width // config.heads
        query_width = config.heads * self.head_width
        group_width = (config.kv_heads or config.heads) * self.head_width
        bias, output_bias = attention_biases(config)
        self.query = Linear(config.width, query_width, bias=bias)
        self.key = Linear(config.width, group_width, bias=bias)
        self.value = Linear(config.width, group_width, bias=bias)
        self.output = Linear(query_width, config.width, bias=output_bias)

    def _split_heads(self, x_BSD: Tensor) -> Tensor:
        # The number of heads is inferred from the tensor, so that a shard of the heads works too.
        return x_BSD.unflatten(-1, (-1, self.head_width))

    def forward(
        self, x_BSD: Tensor, stream: SequenceInfo, cache: AttentionCache | None = None
    ) -> Tensor:
        """Apply self-attention to x (B,S,D)."""
        query_BSHK, key_BSGK = (
            self._split_heads(self.query(x_BSD)),
            self._split_heads(self.key(x_BSD)),
        )
        if stream.rope is not None:
            query_BSHK, key_BSGK = (
                apply_rope(query_BSHK, stream.rope),
                apply_rope(key_BSGK, stream.rope),
            )
        key_BGSK = key_BSGK.transpose(1, 2)
        value_BGSK = self._split_heads(self.value(x_BSD)).transpose(1, 2)
        causal = stream.causal and stream.documents_BS is None and stream.valid_BS is None
        if cache is not None:
            causal = causal and cache.length == 0  # a later token attends to all cached ones
            key_BGSK, value_BGSK = cache.append(key_BGSK, value_BGSK)
        return self._attend_global(query_BSHK, key_BGSK, value_BGSK, stream, causal)

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
            key_BGTK = self._split_heads(self.key(memory_BTD)).transpose(1, 2)
            value_BGTK = self._split_heads(self.value(memory_BTD)).transpose(1, 2)
            if cache is not None:
                cache.key, cache.value = key_BGTK, value_BGTK
        return self._attend_global(
            self._split_heads(self.query(x_BSD)), key_BGTK, value_BGTK, memory, causal=False
        )

    def _attend_global(
        self,
        query_BSHK: Tensor,
        key_BGSK: Tensor,
        value_BGSK: Tensor,
        keys: SequenceInfo,
        causal: bool,
    ) -> Tensor:
        query_BHSK, mask = query_BSHK.transpose(1, 2), keys.mask
        if keys.context.shares:
            mixed_BHSK = keys.context.attend_global(
                query_BHSK, key_BGSK, value_BGSK, keys.total, keys.visible_mask, causal
            )
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
    """Two linear layers around an activation; gated for swiglu and geglu (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        gated = config.activation in ("swiglu", "geglu")
        self.gate = Linear(config.width, config.ffn_width, bias=config.bias) if gated else None
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
    ):
        super().__init__()
        self.stream = stream  # source | target: the sequence of x
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
        branch_BSD = self.attention(
            own.gather_local(self.attention_norm(x_BSD)), own, cache.attention if cache else None
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
