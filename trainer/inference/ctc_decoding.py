"""Decoding of CTC: from the logits of each vector to the classes that are said."""

# T vectors, V classes, K most probable classes of a vector.

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from trainer.config.loss import BLANK

NEVER = -np.inf  # log-probability


def decode_logits(logits_TV: Tensor, beams: int = 1) -> list[int]:
    """Return the classes that are said, by the best path, or by the best of `beams` prefixes."""
    return best_path(logits_TV) if beams == 1 else prefix_beam_search(logits_TV, beams)


def best_path(logits_TV: Tensor) -> list[int]:
    """Return the most probable class of each vector, without repeats and blanks."""
    path = torch.unique_consecutive(logits_TV.argmax(-1)).tolist()
    return [name for name in path if name != BLANK]


def prefix_beam_search(logits_TV: Tensor, beams: int) -> list[int]:
    """Return the most probable sequence that a search over prefixes finds (arXiv 1408.2873).

    The probability of a prefix is the sum over all its alignments that were kept; the `beams` best
    prefixes are. Each is extended by the 2 × `beams` most probable classes of a vector.
    """
    log_TV = logits_TV.double().log_softmax(-1)
    likely = log_TV.topk(min(2 * beams + 1, log_TV.shape[1]), dim=-1)
    blank_T = log_TV[:, BLANK].tolist()
    # Log-probabilities of a prefix's alignments that end in a blank, and in its last class.
    prefixes: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, NEVER)}
    rows = zip(likely.indices.tolist(), likely.values.tolist(), blank_T, strict=True)
    for classes, values, blank in rows:
        found = _extend(prefixes, dict(zip(classes, values, strict=True)), blank)
        best = sorted(found, key=lambda prefix: -np.logaddexp(*found[prefix]))[:beams]
        prefixes = {prefix: found[prefix] for prefix in best}
    return list(next(iter(prefixes)))


def _extend(
    prefixes: dict[tuple[int, ...], tuple[float, float]], likely: dict[int, float], blank: float
) -> dict[tuple[int, ...], tuple[float, float]]:
    """Return the prefixes one vector later, with the log-probabilities of their alignments."""
    ends: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [NEVER, NEVER])
    for prefix, (in_blank, in_class) in prefixes.items():
        either = float(np.logaddexp(in_blank, in_class))
        kept = ends[prefix]
        kept[0] = float(np.logaddexp(kept[0], either + blank))
        for name, value in likely.items():
            if name == BLANK:
                continue
            repeats = bool(prefix) and prefix[-1] == name
            if repeats:  # the same class again, or, behind a blank, once more
                kept[1] = float(np.logaddexp(kept[1], in_class + value))
            longer = ends[(*prefix, name)]
            longer[1] = float(np.logaddexp(longer[1], (in_blank if repeats else either) + value))
    return {prefix: (values[0], values[1]) for prefix, values in ends.items()}


def window_bounds(length: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """Return the ranges of windows that cover a length and overlap; a short length is one."""
    if length <= window:
        return [(0, length)]
    starts = [*range(0, length - window, window - overlap), length - window]
    return [(start, start + window) for start in starts]


def join_windows(parts: Sequence[Tensor], bounds: Sequence[tuple[int, int]], length: int) -> Tensor:
    """Return the rows of all windows, cut in the middle of where they overlap."""
    cuts = [(end + start) // 2 for (_, end), (start, _) in pairwise(bounds)]
    firsts, lasts = [0, *cuts], [*cuts, length]
    found = [
        part_TV[first - start : last - start]
        for part_TV, (start, _), first, last in zip(parts, bounds, firsts, lasts, strict=True)
    ]
    return torch.cat(found)
