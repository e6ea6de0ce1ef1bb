"""Float8 linear layers through torchao: 8-bit operands, accumulation in higher precision.

Applies to the linear layers between embedding and head; weights, gradients and everything else are
as with precision=bf16. A layer's class is replaced before parallelism is applied; the layer gets
no submodule and no parameter, so that every strategy handles it as a plain Linear.
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

CAPABILITY = (8, 9)  # lowest compute capability with float8 kernels


@dataclass(frozen=True)
class Recipe:
    """torchao's options for the matrix products of a layer; one object per model."""

    product: Any  # torchao's autograd function: (input, transposed weight, kernels, casts)
    kernels: Any  # GEMM options for the output, the input gradient and the weight gradient
    casts: Any  # float8 dtype and scaling granularity of each operand


class Float8Linear(Linear):
    """A linear layer whose three matrix products have 8-bit operands (e4m3, arXiv 2209.05433).

    The output and the gradients have the dtype of the input. Both dimensions of the weight are
    multiples of 16. Under tensor parallelism the scales are those of the local weight shard.
    """

    recipe: Recipe

    def forward(self, input: Tensor) -> Tensor:
        r, weight = self.recipe, self.local_part("weight").to(input.dtype)
        x = r.product.apply(input, weight.t(), r.kernels, r.casts)
        bias = self.cast_bias(x)
        return x if bias is None else x + bias


def multiply_in_float8(blocks: nn.Module) -> None:
    """Replace the linear layers of blocks by float8 ones; call it before parallelism is applied.

    torch runs the same code on a CPU too, slowly: only tests use that, since `check_float8` rejects
    such a run.
    """
    recipe = _float8_recipe()

    def swap_linear(module: nn.Module) -> None:
        if type(module) is Linear:
            module.__class__ = Float8Linear
            assert isinstance(module, Float8Linear)
            module.recipe = recipe

    blocks.apply(swap_linear)


def check_float8(device: str, ranks: int) -> None:
    """Raise ConfigError if up to `ranks` ranks of this host cannot multiply in float8.

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


def _float8_recipe() -> Recipe:
    """Build torchao's `rowwise` recipe: one scale per row of an operand, a power of two.

    With the faster `tensorwise` recipe (one scale per operand) the rounding of a sample would
    depend on the other samples of its micro-batch. With `rowwise` it depends on its own token
    alone, and a power-of-two scale changes only digits of values at or below 2^-14 of the row's
    maximum: layouts and micro-batch sizes differ by little more than they do in bf16.
    """
    # Imported only when needed: the import takes seconds and writes to stderr.
    float8, linear = import_module("torchao.float8"), import_module("torchao.float8.float8_linear")
    # Called for its side effect, which has no function of its own: torch.compile then avoids a
    # Triton instruction that corrupts float8 values (triton-lang/triton#11111).
    float8.convert_to_float8_training(nn.Identity())
    casts = float8.Float8LinearConfig.from_recipe_name("rowwise")

    def kernel(gemm: Any, pads: bool = False) -> Any:
        return float8.ScaledMMConfig(use_fast_accum=gemm.use_fast_accum, pad_inner_dim=pads)

    # The weight gradient sums over tokens, whose count need not be a multiple of 16.
    kernels = float8.LinearMMConfig(
        kernel(casts.gemm_config_output),
        kernel(casts.gemm_config_grad_input),
        kernel(casts.gemm_config_grad_weight, pads=True),
    )
    return Recipe(linear.matmul_with_hp_or_float8_args, kernels, casts)
