"""Cross-entropy of the positions that have a valid target, beside torch's of all."""

import pytest
import torch
from torch.nn import functional as F

from trainer.config.loss import IGNORED
from trainer.loss import PARTS, projected_cross_entropy_sum

SHAPE, WIDTH, CLASSES = (4, 24), 6, 11


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("valid", [0, 1, 17, 40, 95, 96])
@pytest.mark.parametrize("more", [0, 20])
def test_a_position_without_a_target_costs_no_logits(valid, more, chunks):
    generator = torch.Generator().manual_seed(valid)
    options = {"generator": generator, "dtype": torch.float64}
    hidden = torch.randn(*SHAPE, WIDTH, **options).requires_grad_()
    weight = torch.randn(CLASSES, WIDTH, **options).requires_grad_()
    targets = torch.full((96,), IGNORED)
    where = torch.randperm(96, generator=generator)[:valid]
    targets[where] = torch.randint(CLASSES, (valid,), generator=generator)
    targets = targets.view(SHAPE)
    rows = []

    def project(hidden_ND):
        rows.append(len(hidden_ND))
        return hidden_ND @ weight.T

    options = {"project": project, "chunks": chunks, "label_smoothing": 0.1}
    ours = projected_cross_entropy_sum(hidden, targets, min(valid + more, 96), **options)
    made = sum(rows)
    gradients = torch.autograd.grad(ours, (hidden, weight))
    theirs = F.cross_entropy(
        (hidden @ weight.T).flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=0.1,
    )
    expected = torch.autograd.grad(theirs, (hidden, weight))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-12)
    assert valid <= made <= min(valid + more + 96 // PARTS, 96)
