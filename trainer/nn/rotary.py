"""Rotary embedding of positions (arXiv 2104.09864), and its extensions to longer contexts."""

# B batch, S sequence, H heads, K width of a head.

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trainer.config.train import ModelConfig, fast_turns, head_width_of

Frequencies = Callable[[Tensor, ModelConfig], Tensor]  # (exponents, model) -> frequencies, (K/2,)


def rotary_angles(
    positions_BS: Tensor, config: ModelConfig, dtype: torch.dtype, windowed: bool = False
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary embedding, each (B,S,1,K/2).

    `windowed`: those of layers with a sliding window, whose base can be another one. Such a base
    is not scaled: a window has the same length in an extended context.
    """
    head_width = head_width_of(config)
    exponents = torch.arange(0, head_width, 2, device=positions_BS.device, dtype=dtype) / head_width
    local = windowed and config.local_rope_theta > 0
    if local or config.rope_scaling == 1.0:
        base = config.local_rope_theta if local else config.rope_theta
        frequency, magnitude = 1.0 / base**exponents, 1.0
    else:
        frequency = SCALINGS[config.rope_type](exponents, config)
        magnitude = _magnitude(config)
    angle = positions_BS[:, :, None, None].to(dtype) * frequency
    if magnitude == 1.0:
        return angle.cos(), angle.sin()
    return angle.cos() * magnitude, angle.sin() * magnitude


def _scale_linear(exponents: Tensor, config: ModelConfig) -> Tensor:
    """Return frequencies that are all divided by the factor (arXiv 2306.15595)."""
    return 1.0 / config.rope_theta**exponents / config.rope_scaling


def _scale_llama3(exponents: Tensor, config: ModelConfig) -> Tensor:
    """Return frequencies of which the low ones are divided, as Llama 3.1 does (arXiv 2407.21783).

    A frequency is low if it turns less than `rope_slow_turns` times within the original context.
    """
    frequency = 1.0 / config.rope_theta**exponents
    turns = config.rope_original_positions * frequency / (2 * torch.pi)
    slow, fast = config.rope_slow_turns, fast_turns(config)
    blend = ((turns - slow) / (fast - slow)).clamp(0.0, 1.0)
    return frequency * (blend + (1.0 - blend) / config.rope_scaling)


def _scale_yarn(exponents: Tensor, config: ModelConfig) -> Tensor:
    """Return frequencies of which the low ones are divided, as YaRN does (arXiv 2309.00071).

    The ramp between low and high is linear in the frequencies' number, between whole numbers.
    """
    frequency, width = 1.0 / config.rope_theta**exponents, head_width_of(config)

    def place_of(turns: float) -> float:
        period = config.rope_original_positions / (turns * 2 * math.pi)
        return width * math.log(period) / (2 * math.log(config.rope_theta))

    low = max(math.floor(place_of(fast_turns(config))), 0)
    high = min(math.ceil(place_of(config.rope_slow_turns)), width - 1)
    places = torch.arange(width // 2, device=exponents.device, dtype=exponents.dtype)
    ramp = ((places - low) / (high - low or 0.001)).clamp(0.0, 1.0)
    return frequency / config.rope_scaling * ramp + frequency * (1.0 - ramp)


def _scale_dynamic(exponents: Tensor, config: ModelConfig) -> Tensor:
    """Return the frequencies of a base that grows with the context ("dynamic NTK").

    The context is `max_positions`: the longest sequence of a batch would differ between ranks.
    """
    original, factor = config.rope_original_positions, config.rope_scaling
    growth = factor * max(config.max_positions, original) / original - (factor - 1.0)
    width = head_width_of(config)
    return 1.0 / (config.rope_theta * growth ** (width / (width - 2))) ** exponents


SCALINGS: dict[str, Frequencies] = {
    "llama3": _scale_llama3,
    "linear": _scale_linear,
    "dynamic": _scale_dynamic,
    "yarn": _scale_yarn,
}


def _magnitude(config: ModelConfig) -> float:
    """Return the factor of cosine and sine: YaRN sharpens the attention in a longer context."""
    if config.rope_type != "yarn":
        return 1.0
    return config.rope_attention_factor or 0.1 * math.log(config.rope_scaling) + 1.0


def apply_rope(x_BSHK: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (k, k + K/2) of a head by its position's angle, in the angles' dtype."""
    cos, sin = rope
    left, right = x_BSHK.chunk(2, dim=-1)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return turned.to(x_BSHK.dtype)
