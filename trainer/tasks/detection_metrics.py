"""COCO's average precision of detections, over all ranks."""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from parallel.parallel_model import MicroBatch, ParallelModel
from trainer.data import Dataset
from trainer.data.detection.dataset import DetectionSplit
from trainer.nn.box_logits import class_logits, patch_boxes, query_boxes
from trainer.nn.boxes import Detections, suppress_repeats
from trainer.tasks.detection_loss import count_boxes

logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)  # it tells its own tables
REPEAT = 0.6  # overlap from which on two boxes of a class are the same object
MOST = 100  # detections of a picture, as COCO counts them
CANDIDATES = 400  # pairs of patch and class that suppression looks at
# Names of COCO's first values, by their place.
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
Row = tuple[int, list[float], float, int]  # picture, corners in its pixels, score, class


def find_boxes(logits_BPV: Tensor, classes: int, queries: int = 0) -> list[Detections]:
    """Return the detections of each picture; corners in sides of its square.

    Those of `queries` are a set: no box repeats another.
    """
    logits_BPV = logits_BPV.to(torch.promote_types(logits_BPV.dtype, torch.float32))
    scores_BPC = class_logits(logits_BPV).sigmoid()[..., :classes]
    boxes_BP4 = query_boxes(logits_BPV, queries) if queries else patch_boxes(logits_BPV)
    repeat = 1.0 if queries else REPEAT
    return [
        suppress_repeats(boxes_P4, scores_PC, repeat, MOST, CANDIDATES)
        for boxes_P4, scores_PC in zip(boxes_BP4, scores_BPC, strict=True)
    ]


class DetectionMetrics:
    """Loss per box, and COCO's average precision (0 to 1)."""

    def __init__(
        self,
        worker: ParallelModel,
        dataset: Dataset,
        queries: int,
        loss_sum: Callable[[Tensor, Tensor], Tensor],
    ):
        """`loss_sum` takes the logits and the targets of the data."""
        assert isinstance(dataset, DetectionSplit)
        self._worker, self._dataset = worker, dataset
        self._queries, self._loss_sum = queries, loss_sum
        self._totals = torch.zeros(2, dtype=torch.float64, device=worker.device)
        self._found: list[Row] = []
        self._seen: list[int] = []

    def update(self, logits: Tensor, inputs: MicroBatch) -> None:
        """Add a micro-batch: its loss, and what is found in its pictures."""
        targets = inputs["targets"]
        loss = self._loss_sum(logits, targets)
        self._totals += torch.stack((loss.double(), count_boxes(targets).double()))
        found = find_boxes(logits, len(self._dataset.class_names), self._queries)
        for index, detections in zip(inputs["index"].tolist(), found, strict=True):
            if index < 0:
                continue
            self._seen.append(index)
            letterbox = self._dataset.letterbox(index)
            corners_N4 = letterbox.restore_corners(detections.boxes_N4.double().cpu().numpy())
            self._found += zip(
                [index] * len(corners_N4),
                corners_N4.tolist(),
                detections.scores_N.tolist(),
                detections.classes_N.tolist(),
                strict=True,
            )

    def compute(self) -> dict[str, float]:
        """Return the metrics over all ranks."""
        nats, boxes = self._worker.sum_over_data(self._totals.clone()).tolist()
        loss = nats / max(boxes, 1)
        parts = self._worker.gather_data_ranks((self._seen, self._found))
        seen = sorted({index for indices, _ in parts for index in indices})
        found = [row for _, rows in parts for row in rows]
        values = average_precisions(self._dataset, seen, found)
        if math.isnan(loss):
            values = dict.fromkeys(values, math.nan)
        return {"eval_loss": loss} | values


def average_precisions(
    dataset: DetectionSplit, seen: list[int], found: list[Row]
) -> dict[str, float]:
    """Return COCO's average precisions of the pictures seen; those of absent sizes are left out."""
    truth = coco_truth(dataset, seen)
    if not truth["annotations"]:
        return {}
    if not found:
        return dict.fromkeys(NAMES[:3], 0.0)
    known = COCO(truth)
    detections = known.loadRes([coco_detection(row) for row in found])
    evaluation = COCOeval_faster(known, detections, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = dict(zip(NAMES, map(float, evaluation.stats), strict=False))
    return {name: value for name, value in values.items() if value >= 0}


def coco_truth(dataset: DetectionSplit, seen: list[int]) -> dict[str, Any]:
    """Return the boxes of these pictures as COCO's annotations."""
    annotations: list[dict[str, Any]] = []
    for index in seen:
        boxes = dataset.truth(index)
        for row in range(len(boxes)):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": int(boxes.classes_N[row]),
                    "bbox": _with_sides(boxes.corners_N4[row]),
                    "area": float(boxes.areas_N[row]),
                    "iscrowd": int(boxes.crowd_N[row]),
                }
            )
    names = enumerate(dataset.class_names)
    return {
        "info": {},
        "images": [{"id": index} for index in seen],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in names],
    }


def coco_detection(row: Row) -> dict[str, Any]:
    """Return a detection as COCO's results have it."""
    index, corners, score, number = row
    return {
        "image_id": index,
        "category_id": number,
        "bbox": _with_sides(np.array(corners)),
        "score": score,
    }


def _with_sides(corners_4: np.ndarray) -> list[float]:
    left, top, right, bottom = map(float, corners_4)
    return [left, top, right - left, bottom - top]
