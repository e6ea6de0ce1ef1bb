"""References of losses inside a model, by torch's own functions alone."""

import torch
from torch import Tensor, nn

from trainer.config.loss import BLANK, IGNORED
from trainer.model import Transformer


def reference_joint_loss(
    model: Transformer, memory_BTD: Tensor, batch: dict[str, Tensor], shared_loss: Tensor
) -> Tensor:
    """Return the mean joint loss per target of `shared_loss`, the decoder's mean.

    What is said is what the decoder is to say, without the end token.
    """
    assert model.ctc is not None
    weight, total = model.config.ctc_weight, memory_BTD.new_zeros(())
    rows = zip(memory_BTD, batch["targets"], batch["source_valid"], strict=True)
    for memory_TD, targets_S, valid_T in rows:
        said = targets_S[targets_S != IGNORED][:-1]
        vectors = int(valid_T.sum())
        if len(said):
            logits_TV = nn.functional.linear(memory_TD[:vectors], model.ctc.output.weight)
            total = total + nn.functional.ctc_loss(
                logits_TV.log_softmax(-1)[:, None],
                said[None],
                torch.tensor([vectors]),
                torch.tensor([len(said)]),
                blank=BLANK,
                reduction="sum",
            )
    count = (batch["targets"] != IGNORED).sum()
    return (1.0 - weight) * shared_loss + weight * total / count


def reference_match(
    ours: Tensor, theirs: Tensor, batch: dict[str, Tensor], of_source: bool
) -> Tensor:
    """Return the mean over valid targets of the mean squared difference of similarities."""
    targets = batch["targets"]
    everywhere = torch.ones(ours.shape[:2], dtype=torch.bool)
    valid = batch.get("source_valid", everywhere) if of_source else targets != IGNORED
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(targets)):
        x, y = ours[row][valid[row]], theirs[row][valid[row]]
        x, y = (nn.functional.cosine_similarity(z[:, None], z[None], dim=-1) for z in (x, y))
        total = total + nn.functional.mse_loss(x, y) * (targets[row] != IGNORED).sum()
    return total / (targets != IGNORED).sum()
