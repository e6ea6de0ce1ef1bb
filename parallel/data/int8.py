"""Gradient all-reduce in 8-bit integers: a quarter of float32's bytes.

Each rank sends its chunk to every rank in 8 bits (all-to-all), sums the received chunks in full
precision, and all-gathers the sum in 8 bits. Both directions have error feedback, as in 1-bit Adam
(arXiv 2102.02888); the all-to-all and the scale per block are as in ZeRO++ (arXiv 2306.10209).
"""

# R ranks, P elements of a chunk, B elements of a block, K blocks of a chunk: R × P is a full
# gradient, padded.

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from parallel.collectives import start_all_gather, start_all_to_all, wait_tensor
from parallel.data.comm_hook import CompressedAllReduce, drop_nonfinite, learned_parameters
from parallel.data.compressed_sizes import BLOCK, SCALE_BYTES, part_size

LARGEST = 127  # code of a block's largest absolute value


class Int8AllReduce(CompressedAllReduce):
    """An all-reduce by an all-to-all of int8 codes, a local sum, and an all-gather of its codes."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup):
        super().__init__(model, group)
        ranks = group.size()
        self._lost: dict[str, Tensor] = {}  # error of the sent chunks, (R, P)
        self._lost_of_sum: dict[str, Tensor] = {}  # error of the local chunk's sum, (1, P)
        for name, parameter in learned_parameters(model):
            size = part_size(parameter.numel(), ranks)
            self._lost[name] = parameter.new_zeros(ranks, size)
            self._lost_of_sum[name] = parameter.new_zeros(1, size)

    def sum_over_ranks(self, gradients: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace gradients by their sums, bitwise identical on every rank."""
        lost = [self._lost[name] for name in gradients]
        lost_of_sum = [self._lost_of_sum[name] for name in gradients]
        own_RP = torch.cat(
            [_rows_per_rank(gradients[name], self._lost[name]) for name in gradients], 1
        )
        own_RP += torch.cat(lost, 1)
        sent = quantize_rows(own_RP)
        received = start_all_to_all(sent, self.group)
        _store_residual(lost, own_RP - dequantize_rows(sent, own_RP.dtype))
        yield
        sum_1P = torch.cat(lost_of_sum, 1)
        # in rank order, independent of the bucket
        for theirs in wait_tensor(received).split(1):
            sum_1P = sum_1P + dequantize_rows(theirs, own_RP.dtype)
        sent = quantize_rows(sum_1P)
        gathered = start_all_gather(sent, self.group)
        _store_residual(lost_of_sum, sum_1P - dequantize_rows(sent, own_RP.dtype))
        yield
        parts = dequantize_rows(wait_tensor(gathered), own_RP.dtype).split(
            [kept.shape[1] for kept in lost], 1
        )
        for gradient, part in zip(gradients.values(), parts, strict=True):
            gradient.copy_(part.reshape(-1)[: gradient.numel()].view(gradient.shape))

    def error_feedback_state(self) -> dict[str, Tensor]:
        """Return this rank's compression errors of sent and of summed chunks, by name."""
        return {f"{name}.sent": lost for name, lost in self._lost.items()} | {
            f"{name}.summed": lost for name, lost in self._lost_of_sum.items()
        }


def quantize_rows(x_RP: Tensor) -> Tensor:
    """Pack each row's int8 codes, followed by the float32 scales of its blocks, as uint8.

    A block with a non-finite element is non-finite after `dequantize_rows`.
    """
    rows = len(x_RP)
    x_RKB = x_RP.view(rows, -1, BLOCK)
    scale_RK = (x_RKB.abs().amax(-1) / LARGEST).float()
    least = torch.finfo(torch.float32).tiny  # a block of zeros has codes 0
    codes = (x_RKB / scale_RK.clamp(min=least)[..., None]).round().clamp(-LARGEST, LARGEST)
    codes_RP = codes.to(torch.int8).view(rows, -1)
    return torch.cat([codes_RP.view(torch.uint8), scale_RK.view(torch.uint8)], 1)


def dequantize_rows(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Unpack `quantize_rows`: the rounded values, (R, P)."""
    rows, size = len(packed), packed.shape[1] // (BLOCK + SCALE_BYTES) * BLOCK
    codes_RKB = packed[:, :size].view(torch.int8).reshape(rows, -1, BLOCK)
    scale_RK = packed[:, size:].contiguous().view(torch.float32)
    return (codes_RKB.to(dtype) * scale_RK.to(dtype)[..., None]).view(rows, size)


def _rows_per_rank(gradient: Tensor, like_RP: Tensor) -> Tensor:
    """Reshape a zero-padded gradient to (R, P), one row per rank."""
    padding = like_RP.numel() - gradient.numel()
    return F.pad(gradient.reshape(-1), (0, padding)).view(like_RP.shape)


def _store_residual(kept: list[Tensor], lost: Tensor) -> None:
    for own, part in zip(
        kept, drop_nonfinite(lost).split([k.shape[1] for k in kept], 1), strict=True
    ):
        own.copy_(part)
