"""Geometry of boxes: overlap, targets of patches, suppression of repeated detections.

Boxes are corners (left, top, right, bottom) in sides of the picture, each from 0 to 1. A target is
a row (class, left, top, right, bottom, crowd) of a sample; rows behind the last have class NO_BOX.
"""

# B batch, N boxes of a sample, P patches, M any number of boxes.

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config.loss import IGNORED

NO_BOX = -1.0  # class of a row that holds no box, and of a patch that shows background
CENTRE_SHARE = 0.25  # of a box's shorter side: how far from its centre patches learn it
CENTRE_PATCHES = 0.75  # at least as far as this
WEIGHT = 5  # column of a patch's target


def box_areas(boxes_M4: Tensor) -> Tensor:
    """Return the areas (M,), 0 for boxes whose corners are the wrong way round."""
    sides_M2 = (boxes_M4[..., 2:] - boxes_M4[..., :2]).clamp(min=0)
    return sides_M2.prod(-1)


def box_overlaps(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the intersection over union of boxes (…,4) that broadcast."""
    shared, union = _shared_and_union(ours, theirs)
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalised_overlaps(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the generalised intersection over union (arXiv 1902.09630), from -1 to 1."""
    shared, union = _shared_and_union(ours, theirs)
    hull = torch.cat(
        (torch.minimum(ours[..., :2], theirs[..., :2]), torch.maximum(ours, theirs)[..., 2:]), -1
    )
    tiny = torch.finfo(union.dtype).tiny
    area = box_areas(hull)
    return shared / union.clamp(min=tiny) - (area - union) / area.clamp(min=tiny)


def _shared_and_union(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    lowest = torch.maximum(ours[..., :2], theirs[..., :2])
    highest = torch.minimum(ours[..., 2:], theirs[..., 2:])
    shared = (highest - lowest).clamp(min=0).prod(-1)
    return shared, box_areas(ours) + box_areas(theirs) - shared


def patch_centres(side: int, like: Tensor) -> Tensor:
    """Return the centres (x, y) of side × side patches, row by row, (P,2)."""
    places = (torch.arange(side, device=like.device, dtype=like.dtype) + 0.5) / side
    down, across = torch.meshgrid(places, places, indexing="ij")
    return torch.stack((across.flatten(), down.flatten()), -1)


def patch_targets(targets_BN6: Tensor, side: int) -> Tensor:
    """Return what each patch learns, (B,P,6): class, distances to four sides, weight.

    FCOS's assignment (arXiv 1904.01355) on a grid of side × side patches: a patch learns a box
    whose centre is near its own, of several the nearest; every box is learned by the nearest patch
    at least. The weights of the patches of a box add up to 1. Patches in a crowd, and those of a
    sample that is ignored, have class IGNORED.
    """
    centre_P2 = patch_centres(side, targets_BN6)
    kind_BN, box_BN4 = targets_BN6[..., 0], targets_BN6[..., 1:5]
    real_BN = (kind_BN >= 0) & (targets_BN6[..., 5] == 0)
    away_BPN = _distances(centre_P2, box_BN4).masked_fill(~real_BN[:, None], torch.inf)
    shorter_BN = (box_BN4[..., 2:] - box_BN4[..., :2]).amin(-1)
    reach_BN = torch.clamp(CENTRE_SHARE * shorter_BN, min=CENTRE_PATCHES / side)
    inside_BPN = _insides(centre_P2, box_BN4)
    nearest_BPN = away_BPN == away_BPN.amin(1, keepdim=True)
    learns_BPN = ((away_BPN <= reach_BN[:, None]) & inside_BPN) | nearest_BPN
    away_BPN = away_BPN.masked_fill(~learns_BPN, torch.inf)
    least_BP, box_BP = away_BPN.min(2)
    found_BP = least_BP.isfinite()
    own_BP4 = box_BN4.gather(1, box_BP[..., None].expand(-1, -1, 4))
    crowd_BN = (kind_BN >= 0) & (targets_BN6[..., 5] != 0)
    hidden_BP = (inside_BPN & crowd_BN[:, None]).any(2)
    hidden_BP = hidden_BP | (kind_BN == IGNORED).any(1, keepdim=True)
    kind_BP = torch.where(found_BP, kind_BN.gather(1, box_BP), NO_BOX)
    kind_BP = torch.where(hidden_BP & ~found_BP, float(IGNORED), kind_BP)
    counts_BN = torch.zeros_like(kind_BN).scatter_add_(1, box_BP, found_BP.to(kind_BN.dtype))
    weight_BP = found_BP / counts_BN.gather(1, box_BP).clamp(min=1)
    away_BP4 = torch.cat((centre_P2 - own_BP4[..., :2], own_BP4[..., 2:] - centre_P2), -1)
    return torch.cat((kind_BP[..., None], away_BP4, weight_BP[..., None]), -1)


def _distances(centre_P2: Tensor, box_BN4: Tensor) -> Tensor:
    """Return the distances of the patches' centres from those of boxes, (B,P,N)."""
    middle_BN2 = (box_BN4[..., :2] + box_BN4[..., 2:]) / 2
    return (centre_P2[None, :, None] - middle_BN2[:, None]).square().sum(-1).sqrt()


def _insides(centre_P2: Tensor, box_BN4: Tensor) -> Tensor:
    """Return whether each patch's centre is inside each box, (B,P,N)."""
    here = centre_P2[None, :, None]
    lowest, highest = box_BN4[:, None, :, :2], box_BN4[:, None, :, 2:]
    return ((here >= lowest) & (here <= highest)).all(-1)


@dataclass(frozen=True)
class Detections:
    """The boxes found in one picture, the most probable first."""

    boxes_N4: Tensor
    scores_N: Tensor  # from 0 to 1
    classes_N: Tensor


def suppress_repeats(
    boxes_P4: Tensor, scores_PC: Tensor, overlap: float, most: int, candidates: int
) -> Detections:
    """Return at most `most` detections, without boxes that overlap a better one of their class.

    Greedy non-maximum suppression for each class, among the `candidates` most probable pairs of
    box and class.
    """
    classes = scores_PC.shape[1]
    scores_M, pairs_M = scores_PC.flatten().sort(descending=True, stable=True)
    scores_M, pairs_M = scores_M[:candidates], pairs_M[:candidates]
    boxes_M4, classes_M = boxes_P4[pairs_M // classes], pairs_M % classes
    repeats_MM = box_overlaps(boxes_M4[:, None], boxes_M4[None]) > overlap
    repeats_MM &= classes_M[:, None] == classes_M[None]
    repeats, gone = repeats_MM.cpu(), torch.zeros(len(boxes_M4), dtype=torch.bool)
    kept: list[int] = []
    for place in range(len(boxes_M4)):
        if len(kept) < most and not gone[place]:
            kept.append(place)
            gone |= repeats[place]
    return Detections(boxes_M4[kept], scores_M[kept], classes_M[kept])
