"""Small models of transformers with random weights, computed in float64 throughout."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import Tensor, nn


@contextmanager
def float64_for_float32() -> Iterator[None]:
    """Replace float32 by float64: transformers computes norms and rotary angles in it."""
    with ExitStack() as stack:
        for name in ("float", "float32"):
            stack.enter_context(mock.patch.object(torch, name, torch.float64))
        stack.enter_context(mock.patch.object(torch, "FloatTensor", torch.DoubleTensor))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        before = torch.get_default_dtype()
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(torch.float64)
        yield


def build_reference(model_class: str, config_class: str, **fields: object) -> nn.Module:
    """Build a model of transformers in float64 with random weights, biases and norms too."""
    with float64_for_float32(), torch.random.fork_rng():
        torch.manual_seed(0)  # whatever ran before
        config = getattr(transformers, config_class)(**fields)
        model = getattr(transformers, model_class)(config).double().eval()
    if fields.get("tie_word_embeddings") is False:  # version 5 ties that of T5 1.1 all the same
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            noise = torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator)
            parameter.add_(noise)
    return model


def save_gradients(model: nn.Module, folder: Path) -> None:
    """Save the gradients as if they were the weights: under the names of the files."""
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder)


def reference_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (…,V) for targets (…)."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
