"""How much faster a feed-forward layer of whole numbers is than one of float32, on this CPU.

`python benchmarks/integers.py [rounds]`: 16, 128 and 512 tokens through a feed-forward layer of
512 → 2,048 → 512, float32 and then bytes times bytes (`compress=int8` as it is exported), in turn;
the medians of the processor time.
"""

import sys
import time
from statistics import median

import torch
from torch import nn

from trainer.compress.quantized_linear import CompressedLinear, QuantizationSpec
from trainer.inference.export import compute_with_integers
from trainer.nn.layers import Linear

WIDTH, HIDDEN = 512, 2048


def layer(kind: type[Linear]) -> nn.Sequential:
    """Both linear layers, as they are used."""
    made = nn.Sequential(kind(WIDTH, HIDDEN), nn.GELU(), kind(HIDDEN, WIDTH))
    for module in made:
        if isinstance(module, CompressedLinear):
            module.lens = QuantizationSpec(bits=8, input_bits=8)
    compute_with_integers(made)
    return made


def seconds(work: nn.Module, x: torch.Tensor) -> float:
    """Processor time of one forward."""
    began = time.process_time()
    work(x)
    return time.process_time() - began


@torch.no_grad()
def main(rounds: int = 50) -> None:
    """A line for each number of tokens."""
    floats, integers = layer(Linear), layer(CompressedLinear)
    for tokens in (16, 128, 512):
        x = torch.randn(tokens, WIDTH)
        pairs = [(seconds(floats, x), seconds(integers, x)) for _ in range(rounds + 3)][3:]
        ratios = sorted(a / b for a, b in pairs)
        ours, theirs = (median(pair[i] for pair in pairs) * 1e3 for i in (1, 0))
        sys.stdout.write(
            f"{tokens} tokens: float32 {theirs:.3g} ms, integers {ours:.3g} ms, ratio "
            f"{median(ratios):.3g} (from {ratios[0]:.3g} to {ratios[-1]:.3g})\n"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
