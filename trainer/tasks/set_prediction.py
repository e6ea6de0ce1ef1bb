"""Loss of a detector of sets: each box is matched with one query (DETR, arXiv 2005.12872)."""

# B batch (of a sample's groups of queries, one by one), Q queries of a group, N boxes, C classes,
# V = C + 4 logits.

from itertools import combinations, permutations
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from trainer.config.loss import IGNORED, LossConfig
from trainer.nn.box_logits import class_logits, query_boxes
from trainer.nn.boxes import generalised_overlaps
from trainer.tasks.detection_loss import ALPHA, GAMMA, focal_loss

VERIFIED_QUERIES = 4  # of a group in `verify`, few enough to try all matchings
# Weights of the matching, and of class and distance in the loss, as in Deformable DETR.
CLASS_COST, DISTANCE_COST, OVERLAP_COST = 2.0, 5.0, 2.0


def centres_and_sides(corners: Tensor) -> Tensor:
    """Return centre, width and height of boxes (…,4)."""
    low, high = corners[..., :2], corners[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def pair_costs(said_BQC: Tensor, boxes_BQ4: Tensor, targets_BN6: Tensor) -> Tensor:
    """Return what it costs to match each query with each row of the targets, (B,Q,N)."""
    kinds_BQN = targets_BN6[:, None, :, 0].long().clamp(min=0).expand(-1, said_BQC.shape[1], -1)
    truth_BN4 = targets_BN6[..., 1:5]
    chance_BQN = said_BQC.sigmoid().gather(2, kinds_BQN)
    hit = ALPHA * (1 - chance_BQN) ** GAMMA * -(chance_BQN + 1e-8).log()
    missed = (1 - ALPHA) * chance_BQN**GAMMA * -(1 - chance_BQN + 1e-8).log()
    apart = centres_and_sides(boxes_BQ4)[:, :, None] - centres_and_sides(truth_BN4)[:, None]
    overlap_BQN = generalised_overlaps(boxes_BQ4[:, :, None], truth_BN4[:, None])
    distance_BQN = DISTANCE_COST * apart.abs().sum(-1)
    return CLASS_COST * (hit - missed) + distance_BQN - OVERLAP_COST * overlap_BQN


@torch.no_grad()
def match_queries(
    said_BQC: Tensor, boxes_BQ4: Tensor, targets_BN6: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the (sample, query, row of the targets) of each match, of least cost in all."""
    costs_BQN = pair_costs(said_BQC, boxes_BQ4, targets_BN6)
    # A model that has diverged is stopped by its loss.
    costs = costs_BQN.double().nan_to_num(1e9).cpu().numpy()
    real = ((targets_BN6[..., 0] >= 0) & (targets_BN6[..., 5] == 0)).cpu().numpy()
    found = []
    for sample, (costs_QN, real_N) in enumerate(zip(costs, real, strict=True)):
        rows = np.flatnonzero(real_N)
        queries, columns = linear_sum_assignment(costs_QN[:, rows])
        found.append(np.stack((np.full_like(queries, sample), queries, rows[columns])))
    samples, queries, rows = torch.from_numpy(np.concatenate(found, 1)).to(said_BQC.device)
    return samples, queries, rows


def set_loss_sum(
    logits: Tensor, targets_BN6: Tensor, queries: int, box_weight: float, **options: Any
) -> Tensor:
    """Return the loss of a sample's queries (B, groups × Q, V), a mean over its groups.

    It is computed in float32 at least, and divided by the global number of boxes: twice the focal
    loss of the classes of all queries, and of those that are matched five times the distance of the
    boxes, and `box_weight` times 1 - generalised overlap.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    groups = logits.shape[1] // queries
    logits_BQV = logits.unflatten(1, (groups, queries)).flatten(0, 1)
    targets_BN6 = targets_BN6.repeat_interleave(groups, 0).to(logits.dtype)
    said_BQC, boxes_BQ4 = class_logits(logits_BQV), query_boxes(logits_BQV, queries)
    samples, numbers, rows = match_queries(said_BQC, boxes_BQ4, targets_BN6)
    matched_M6 = targets_BN6[samples, rows]
    labels_BQC = torch.zeros_like(said_BQC)
    labels_BQC[samples, numbers, matched_M6[:, 0].long()] = 1.0
    counts_B = (targets_BN6[:, :, 0] != IGNORED).all(1)
    classes = (focal_loss(said_BQC, labels_BQC) * counts_B[:, None, None]).sum()
    boxes_M4, truth_M4 = boxes_BQ4[samples, numbers], matched_M6[:, 1:5]
    apart = (centres_and_sides(boxes_M4) - centres_and_sides(truth_M4)).abs().sum()
    overlap = (1 - generalised_overlaps(boxes_M4, truth_M4)).sum()
    return (CLASS_COST * classes + DISTANCE_COST * apart + box_weight * overlap) / groups


def reference_set_loss(logits: Tensor, targets_BN6: Tensor) -> Tensor:
    """Return `set_loss_sum` for `verify`: the cheapest of all matchings, one by one."""
    total = logits.new_zeros(())
    for said, targets_N6 in zip(logits, targets_BN6, strict=True):
        for group in said.split(VERIFIED_QUERIES):
            if (targets_N6[:, 0] != IGNORED).all():
                total = total + _reference_group(group, targets_N6)
    return total / (logits.shape[1] // VERIFIED_QUERIES)


def _reference_group(logits_QV: Tensor, targets_N6: Tensor) -> Tensor:
    said_QC, boxes_Q4 = class_logits(logits_QV), query_boxes(logits_QV[None], len(logits_QV))[0]
    real = [row for row in targets_N6 if row[0] >= 0 and row[5] == 0]
    numbers, least = range(len(logits_QV)), min(len(logits_QV), len(real))
    truth_N6 = torch.stack(real) if real else targets_N6[:0]
    costs = pair_costs(said_QC[None], boxes_Q4[None], truth_N6[None])[0]
    matchings = (
        list(zip(own, rows, strict=True))
        for own in permutations(numbers, least)
        for rows in combinations(range(len(real)), least)
    )
    best = min(matchings, key=lambda pairs: sum(costs[q, n].item() for q, n in pairs))
    total = logits_QV.new_zeros(())
    kinds = {query: int(real[row][0]) for query, row in best}
    for query, said_C in enumerate(said_QC):
        for number, p in enumerate(said_C.sigmoid()):
            share, right = (ALPHA, p) if kinds.get(query) == number else (1 - ALPHA, 1 - p)
            total = total - CLASS_COST * share * (1 - right) ** GAMMA * right.log()
    for query, row in best:
        ours, theirs = boxes_Q4[query], real[row][1:5]
        total = (
            total
            + DISTANCE_COST * (centres_and_sides(ours) - centres_and_sides(theirs)).abs().sum()
        )
        total = total + LossConfig().box_weight * (1 - generalised_overlaps(ours, theirs))
    return total
