"""Layers that multiply in float8, through torchao: factors of 8 bits, sums of more.

The layers between embedding and head do; weights, gradients and everything else are as with
precision=bf16. A layer's class is replaced before it is split or sharded; it gets no child and no
parameter, so that every strategy sees the layer that it was.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from parallel.errors import ConfigError
from parallel.runtime import choose_device
from trainer.nn.layers import Linear

CAPABILITY = (8, 9)  # of the first GPUs with float8 kernels


@dataclass(frozen=True)
class Recipe:
    """The options of torchao for each product; one object for all of a model."""

    product: Any  # its autograd function: (input, transposed weight, kernels, casts)
    kernels: Any  # of output, gradient of the input, gradient of the weight
    casts: Any  # what each factor is rounded to, and by which scale


class Float8Linear(Linear):
    """A linear layer whose three products have factors of 8 bits (e4m3, arXiv 2209.05433).

    Its output and gradients have the dtype of its input. The sizes of its weight are multiples of
    16. Tensor parallelism gives it a part of the weight, and the scales are of that part.
    """

    recipe: Recipe

    def forward(self, input: Tensor) -> Tensor:
        r, weight = self.recipe, self.weight.to(input.dtype)
        x = r.product.apply(input, weight.t(), r.kernels, r.casts)
        return x if self.bias is None else x + self.bias.to(x.dtype)


def multiply_in_float8(blocks: nn.Module) -> None:
    """Let the linear layers of blocks that are not yet spread over ranks multiply in float8.

    torch does that on a CPU too, by the same code and slowly: for tests, since no run gets there
    (`check`).
    """
    recipe = _recipe()

    def swap(module: nn.Module) -> None:
        if type(module) is Linear:
            module.__class__ = Float8Linear
            assert isinstance(module, Float8Linear)
            module.recipe = recipe

    blocks.apply(swap)


def check(device: str, ranks: int) -> None:
    """Raise ConfigError where up to `ranks` ranks of this host cannot multiply in float8.

    `device` is auto, cpu or cuda.
    """
    needs = "precision=fp8 needs NVIDIA GPUs of compute capability 8.9 or more (Ada, Hopper)"
    if choose_device(device, 1) == "cpu":
        raise ConfigError(f"{needs}, but the ranks compute on a CPU; set precision=fp32, or bf16")
    for number in range(min(ranks, torch.cuda.device_count())):
        found = torch.cuda.get_device_capability(number)
        if found < CAPABILITY:
            raise ConfigError(
                f"{needs}, but {torch.cuda.get_device_name(number)} has "
                f"{'.'.join(map(str, found))}; set precision=bf16"
            )
    if find_spec("torchao") is None:
        raise ConfigError(
            'precision=fp8 needs `torchao`: pip install "samestep[torchao]"; or set precision=bf16'
        )


def _recipe() -> Recipe:
    """torchao's `rowwise`: a scale for each row of a factor, rounded to a power of two.

    With one scale for all of a factor (`tensorwise`), which is faster, what a sample's numbers are
    rounded to would follow from the other samples of its micro-batch. Here it follows from its own
    token, and a power of two changes no digit but of what is 2^-14 of its row's largest or less:
    layouts and micro-batches differ by little more than they do in bf16.
    """
    # Its import takes seconds and writes to stderr: nobody else has it.
    float8, linear = import_module("torchao.float8"), import_module("torchao.float8.float8_linear")
    # Called for what it does besides, which is nowhere else: it lets torch.compile pass by an
    # instruction of Triton that spoils float8 numbers (triton-lang/triton#11111).
    float8.convert_to_float8_training(nn.Identity())
    casts = float8.Float8LinearConfig.from_recipe_name("rowwise")

    def kernel(gemm: Any, pads: bool = False) -> Any:
        return float8.ScaledMMConfig(use_fast_accum=gemm.use_fast_accum, pad_inner_dim=pads)

    # The gradient of a weight sums over tokens, whose number need not be a multiple of 16.
    kernels = float8.LinearMMConfig(
        kernel(casts.gemm_config_output),
        kernel(casts.gemm_config_grad_input),
        kernel(casts.gemm_config_grad_weight, pads=True),
    )
    return Recipe(linear.matmul_with_hp_or_float8_args, kernels, casts)
