"""Activation checkpointing: saved bytes shrink, gradients stay equal."""

from dataclasses import replace

import pytest
import torch
from tiny import build
from torch.utils.flop_counter import FlopCounterMode

from parallel.activation_checkpointing import MODES, checkpoint_activations
from trainer.verify.cases import FAMILIES, make_batch, scale_down


def step(mode: str) -> tuple[int, dict[str, torch.Tensor]]:
    """Return the bytes saved by the forward, and the gradients."""
    config = replace(scale_down(FAMILIES["decoder (Llama)"]), layers=4)
    model = build(config)
    for block in model.blocks.values():
        checkpoint_activations(block, mode)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(make_batch(config, 0, 0)).square().mean()
    loss.backward()
    return sum(kept.values()), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def plain():
    return step("none")


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_equal(plain, mode):
    gradients = step(mode)[1]
    assert gradients.keys() == plain[1].keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain[1][name]), name


def test_a_block_keeps_less(plain):
    assert step("block")[0] < 0.5 * plain[0]


def test_selective_recomputes_no_matrix_product():
    def products(mode: str) -> int:
        with FlopCounterMode(display=False) as counter:
            step(mode)
        return counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    assert products("selective") == products("none")
    assert products("block") > 1.2 * products("none")
