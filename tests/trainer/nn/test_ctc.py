"""CTC beside a decoder: what it learns, and the whole of the gradient that it adds."""

from functools import partial

import pytest
import torch
from tiny import build
from torch.nn import functional as F

from trainer.build import add_ctc_loss
from trainer.config.loss import IGNORED, NO_CHARACTER
from trainer.config.train import ModelConfig
from trainer.nn.ctc import transcript_targets

WEIGHT = 0.4
MODEL = ModelConfig(
    family="encoder_decoder",
    inputs="audio",
    layers=1,
    width=16,
    heads=2,
    ffn_width=32,
    vocab_size=11,
    max_positions=8,
    mels=5,
    positions="learned",
    init_std=0.3,
    ctc_weight=WEIGHT,
)
TARGETS = torch.tensor(
    [
        [IGNORED, 3, 3, 5, 9, IGNORED],  # what is given, what is said, the end token
        [9, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED],  # nothing is said
        [IGNORED] * 6,
        [1, 2, 3, 4, 5, 9],
    ]
)
LENGTHS = [5, 4, 3, 7]


def make_inputs() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    valid_BT = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    frames_BFM = torch.randn(4, 14, 5, generator=draw, dtype=torch.float64)
    frames_BFM *= valid_BT.repeat_interleave(2, dim=1)[..., None]
    tokens_BS = torch.randint(0, 11, (4, 6), generator=draw)
    return {"source": frames_BFM, "source_valid": valid_BT, "tokens": tokens_BS, "targets": TARGETS}


def test_what_is_said_is_the_targets_without_the_end():
    found_BT = transcript_targets(make_inputs(), vectors=8, stride=2)
    n, i = NO_CHARACTER, IGNORED
    assert found_BT.tolist() == [
        [3, 3, 5, n, n, i, i, i],
        [n, n, n, n, i, i, i, i],
        [n, n, n, i, i, i, i, i],
        [1, 2, 3, 4, 5, n, n, i],
    ]
    whole = {"source": torch.zeros(4, 13, 5), "targets": TARGETS}
    assert (transcript_targets(whole, 8, 2) != IGNORED).sum(1).tolist() == [7] * 4


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_branch_adds_the_gradient_of_its_loss(scale):
    model, inputs, added = build(MODEL), make_inputs(), []
    names = dict(model.named_parameters())
    memory = []
    hook = model.blocks["0"].register_forward_hook(lambda _m, _x, y: memory.append(y[1]))
    logits_BSV = model(inputs)
    hook.remove()
    shared = (1 - WEIGHT) * F.cross_entropy(
        logits_BSV.flatten(0, 1), TARGETS.flatten(), reduction="sum", ignore_index=IGNORED
    )
    nats = 0.0
    for row, said in ((0, [3, 3, 5]), (3, [1, 2, 3, 4, 5])):
        logits_TV = memory[0][row, : LENGTHS[row]] @ model.ctc.output.weight.T
        lengths = torch.tensor([LENGTHS[row]]), torch.tensor([len(said)])
        log_T1V = logits_TV.log_softmax(-1)[:, None]
        nats = nats + F.ctc_loss(log_T1V, torch.tensor([said]), *lengths, reduction="sum")
    expected = torch.autograd.grad(scale * (shared + WEIGHT * nats), list(names.values()))

    def scale_loss(loss_sum):
        added.append(loss_sum.item())
        return scale * loss_sum

    model.scale_auxiliary_loss = scale_loss
    model.block_hooks["0"].append(partial(add_ctc_loss, model))
    logits_BSV = model(inputs)
    main = F.cross_entropy(
        logits_BSV.flatten(0, 1), TARGETS.flatten(), reduction="sum", ignore_index=IGNORED
    )
    (scale * (1 - WEIGHT) * main).backward()
    assert added == [pytest.approx(WEIGHT * nats.item(), rel=1e-12)]
    for (name, parameter), theirs in zip(names.items(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-9, atol=1e-12, msg=name)
