"""Meaning of a detector's logits: classes, and the box of a patch or of a query."""

# B batch, P patches, Q queries, C classes, V = C + 4 logits.

import torch
from torch import Tensor

from trainer.config.model import BOX_SIDES
from trainer.nn.boxes import patch_centres

PRIOR = -4.0  # logit of a class before anything is learned: most patches show none
MIDDLE = -2.0  # logarithm of a distance, in sides of the picture, before anything is learned
SMALL = -1.0  # of a query's box: logit of its width and height before anything is learned
FARTHEST = 1.0  # a distance's largest logarithm


def class_logits(logits: Tensor) -> Tensor:
    """Return the logits of the classes, each by itself, (…,C)."""
    return logits[..., :-BOX_SIDES] + PRIOR


def side_distances(logits: Tensor) -> Tensor:
    """Return the distances to left, top, right and bottom, in sides of the picture, (…,4)."""
    return (logits[..., -BOX_SIDES:] + MIDDLE).clamp(max=FARTHEST).exp()


def patch_boxes(logits_BPV: Tensor) -> Tensor:
    """Return the corners of the boxes of all patches of square pictures, (B,P,4)."""
    centre_P2 = patch_centres(round(logits_BPV.shape[1] ** 0.5), logits_BPV)
    away_BP4 = side_distances(logits_BPV)
    return torch.cat((centre_P2 - away_BP4[..., :2], centre_P2 + away_BP4[..., 2:]), -1)


def query_boxes(logits_BQV: Tensor, queries: int) -> Tensor:
    """Return the corners of the boxes of queries, (B,Q,4), each near its place of a grid.

    Q is a multiple of `queries`, a square number: every group of them has a grid. The centre is
    counted from that place on a logistic scale, as in Deformable DETR (arXiv 2010.04159).
    """
    anchor_Q2 = patch_centres(round(queries**0.5), logits_BQV)
    anchor_Q2 = anchor_Q2.repeat(logits_BQV.shape[1] // queries, 1)
    said_BQ4 = logits_BQV[..., -BOX_SIDES:]
    centre_BQ2 = (anchor_Q2.logit() + said_BQ4[..., :2]).sigmoid()
    half_BQ2 = (said_BQ4[..., 2:] + SMALL).sigmoid() / 2
    return torch.cat((centre_BQ2 - half_BQ2, centre_BQ2 + half_BQ2), -1)
