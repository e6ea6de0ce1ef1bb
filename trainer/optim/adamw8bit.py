"""AdamW with 8-bit moments: a quarter of float32's memory, with a scale per block.

Codes stand for the values of a dynamic map, as in bitsandbytes and torchao (arXiv 2110.02861), with
two differences. Blocks lie along rows, so that codes and scales are sharded like the parameter and
a checkpoint loads under another layout. And a flag on the device skips an update, as in torch's
fused AdamW, so that the host never waits for it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.config.train import OptimConfig
from trainer.optim.local_optimizer import LocalOptimizer, local_parts
from trainer.optim.parameter_groups import ParameterGroup, torch_groups

LARGEST_BLOCK = 256  # maximum numbers per scale
SMALLEST_BLOCK = 32  # smaller blocks would not save memory: such moments stay in float32
SCALE = "_scale"  # suffix of a moment's name
PIECE = 2**24  # maximum numbers updated at once: 64 MiB for each of a few float32 temporaries


def block_size(parameter: Tensor) -> int:
    """Return the block size, a power of two that divides every shard's rows; 0 = no blocks."""
    if parameter.dim() < 2:
        return 0
    row, parts = parameter.shape[-1], 1
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if getattr(placement, "dim", None) == parameter.dim() - 1:
                parts *= parameter.device_mesh.size(axis)
    size = math.gcd(LARGEST_BLOCK, row // parts) if row % parts == 0 else 0
    return size if size >= SMALLEST_BLOCK else 0


def dynamic_map(signed: bool) -> Tensor:
    """Return the 256 ascending values of the codes, from nearly -1 (0 if unsigned) to 1.

    Each power of ten has twice as many values as the next smaller one.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        means = 10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2
        values += [means, -means] if signed else [means]
    return torch.cat(values).sort().values.float()


def quantize_blocks(x: Tensor, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the codes (uint8, of x's shape) and scales (float32, with a shorter last dim)."""
    blocks = x.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1).float()
    shares = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    middles = ((values[1:] + values[:-1]) / 2).to(x.dtype)
    codes = torch.bucketize(shares, middles, out_int32=True, right=True)
    return codes.to(torch.uint8).flatten(-2), scale


def dequantize_blocks(codes: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    """Return the dequantized values of codes and scales, float32."""
    blocks = values[codes.int()].unflatten(-1, (scale.shape[-1], -1))
    return (blocks * scale[..., None]).flatten(-2)


class AdamW8bit(torch.optim.Optimizer):
    """`torch.optim.AdamW` with 8-bit moments where `blocks` gives a parameter's block size."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        blocks: dict[Tensor, int],
        betas: tuple[float, float],
        eps: float,
    ):
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.found_inf: Tensor | None = None  # 1 = skip the update; a float32 scalar
        self._blocks, self._betas, self._eps = blocks, betas, eps
        device = next(iter(blocks)).device
        maps = {"exp_avg": dynamic_map(signed=True), "exp_avg_sq": dynamic_map(signed=False)}
        self._maps = {moment: values.to(device) for moment, values in maps.items()}
        for tensor in blocks:
            self.state[tensor] = {"step": torch.zeros((), device=device)}
            for moment in maps:
                self.state[tensor] |= self._encode(tensor, moment, torch.zeros_like(tensor))

    def _encode(self, tensor: Tensor, moment: str, value: Tensor) -> dict[str, Tensor]:
        """Return what is stored of a moment, or of some of its rows, by name."""
        if not (block := self._blocks[tensor]):
            return {moment: value}
        codes, scale = quantize_blocks(value, self._maps[moment], block)
        return {moment: codes, moment + SCALE: scale}

    def _load_rows(self, tensor: Tensor, moment: str, rows: slice) -> Tensor:
        state = self.state[tensor]
        if not self._blocks[tensor]:
            return state[moment][rows]
        codes, scale = state[moment][rows], state[moment + SCALE][rows]
        return dequantize_blocks(codes, scale, self._maps[moment]).to(tensor.dtype)

    def _store_rows(
        self, tensor: Tensor, moment: str, rows: slice, value: Tensor, keep: Tensor
    ) -> None:
        """Store rows of a moment in place, or nothing where `keep` is true."""
        for name, content in self._encode(tensor, moment, value).items():
            old = self.state[tensor][name][rows]
            old.copy_(torch.where(keep, old, content))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2)."""
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                assert self.found_inf is not None
                self.state[tensor]["step"] += 1 - self.found_inf
                # In pieces: temporaries of a whole embedding would take what the codes save.
                many = max(1, PIECE * len(tensor) // tensor.numel())
                for start in range(0, len(tensor), many):
                    rows = slice(start, start + many)
                    self._update_rows(tensor, rows, group["lr"], group["weight_decay"])

    def _update_rows(self, tensor: Tensor, rows: slice, lr: float, weight_decay: float) -> None:
        assert self.found_inf is not None and tensor.grad is not None
        keep, count = self.found_inf > 0, self.state[tensor]["step"]
        old, gradient = tensor[rows], tensor.grad[rows]
        first, second = self._betas
        average = self._load_rows(tensor, "exp_avg", rows).lerp(gradient, 1 - first)
        square = self._load_rows(tensor, "exp_avg_sq", rows).lerp(gradient.square(), 1 - second)
        root = (square / (1 - second**count)).sqrt() + self._eps
        new = old * (1 - lr * weight_decay) - lr * average / (1 - first**count) / root
        old.copy_(torch.where(keep, old, new))
        self._store_rows(tensor, "exp_avg", rows, average, keep)
        self._store_rows(tensor, "exp_avg_sq", rows, square, keep)


def build_adamw8bit(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup], config: OptimConfig
) -> LocalOptimizer:
    """Return AdamW with 8-bit moments on the local shard of every parameter."""
    local = local_parts(parameters)
    blocks = {local[name]: block_size(parameter) for name, parameter in parameters.items()}
    betas = (config.betas[0], config.betas[1])
    return LocalOptimizer(
        parameters, local, AdamW8bit(torch_groups(groups, local), blocks, betas, config.eps)
    )
