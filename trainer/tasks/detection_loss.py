"""Loss of a dense detector: focal loss of the classes, generalised overlap of the boxes; sums."""

# B batch, P patches, C classes, V = C + 4 logits.

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.config.loss import IGNORED
from trainer.nn.box_logits import class_logits, side_distances
from trainer.nn.boxes import WEIGHT, generalised_overlaps

ALPHA, GAMMA = 0.25, 2.0  # arXiv 1708.02002


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the focal loss (arXiv 1708.02002) of each logit; labels are 0 or 1."""
    nats = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    chance = logits.sigmoid()
    missed = torch.where(labels > 0, 1 - chance, chance)
    return torch.where(labels > 0, ALPHA, 1 - ALPHA) * missed**GAMMA * nats


def dense_loss_sum(
    logits_BPV: Tensor, targets_BP6: Tensor, box_weight: float, **options: Any
) -> Tensor:
    """Return the loss of all patches, whose targets are those of `patch_targets`.

    It is computed in float32 at least, and divided by the global number of boxes: the classes of
    all patches, and `box_weight` times 1 - generalised overlap, a mean over the patches of a box.
    """
    logits_BPV = logits_BPV.to(torch.promote_types(logits_BPV.dtype, torch.float32))
    kind_BP1, away_BP4 = targets_BP6[..., :1], targets_BP6[..., 1:5].to(logits_BPV.dtype)
    said_BPC = class_logits(logits_BPV)
    labels_BPC = (kind_BP1 == torch.arange(said_BPC.shape[-1], device=said_BPC.device)).to(
        said_BPC.dtype
    )
    classes = torch.where(kind_BP1 != IGNORED, focal_loss(said_BPC, labels_BPC), 0.0).sum()
    # Corners as seen from the centre of the patch.
    sign_4 = away_BP4.new_tensor([-1.0, -1.0, 1.0, 1.0])
    overlap_BP = generalised_overlaps(side_distances(logits_BPV) * sign_4, away_BP4 * sign_4)
    learned_BP = kind_BP1[..., 0] >= 0
    boxes = torch.where(learned_BP, (1 - overlap_BP) * targets_BP6[..., WEIGHT], 0.0).sum()
    return classes + box_weight * boxes


def dense_divergence_sum(
    logits_BPV: Tensor, teacher_BPV: Tensor, targets_BP6: Tensor, temperature: float
) -> Tensor:
    """Return how far a dense detector is from its teacher, for targets of `patch_targets`.

    Of each class at each patch the divergence of its probability, times the square of the
    difference (the generalised focal loss, arXiv 2006.04388); of patches that learn a box 1 - the
    generalised overlap with the teacher's, as far as the teacher is sure of a class there. The
    latter knows no temperature, whose square the divergence is multiplied by.
    """
    precise = torch.promote_types(logits_BPV.dtype, torch.float32)
    ours_BPV, theirs_BPV = logits_BPV.to(precise), teacher_BPV.to(precise)
    said_BPC, told_BPC = (class_logits(logits) / temperature for logits in (ours_BPV, theirs_BPV))
    chance_BPC = told_BPC.sigmoid()
    nats_BPC = F.binary_cross_entropy_with_logits(said_BPC, chance_BPC, reduction="none")
    nats_BPC = nats_BPC - F.binary_cross_entropy_with_logits(told_BPC, chance_BPC, reduction="none")
    apart_BPC = (said_BPC.sigmoid() - chance_BPC).abs() ** GAMMA * nats_BPC
    kind_BP = targets_BP6[..., 0]
    classes = torch.where((kind_BP != IGNORED)[..., None], apart_BPC, 0.0).sum()
    sign_4 = ours_BPV.new_tensor([-1.0, -1.0, 1.0, 1.0])
    overlap_BP = generalised_overlaps(
        side_distances(ours_BPV) * sign_4, side_distances(theirs_BPV) * sign_4
    )
    sure_BP = class_logits(theirs_BPV).sigmoid().amax(-1) * targets_BP6[..., WEIGHT]
    boxes = torch.where(kind_BP >= 0, (1 - overlap_BP) * sure_BP, 0.0).sum()
    return classes + boxes / temperature**2


def count_boxes(targets_BN6: Tensor) -> Tensor:
    """Return the number of boxes that are learned, an int64 scalar."""
    return ((targets_BN6[..., 0] >= 0) & (targets_BN6[..., 5] == 0)).sum()
