"""Learned queries of a detector of sets (DETR, arXiv 2005.12872) as a decoder's tokens."""

# P places of a grid, D width.

import math

import torch
from torch import Tensor

from trainer.config.train import ModelConfig
from trainer.nn.boxes import patch_centres
from trainer.nn.sequence import Inputs


def with_queries(inputs: Inputs, config: ModelConfig, training: bool) -> Inputs:
    """Return the inputs with the queries' numbers as tokens, if the model has queries.

    While training there are `query_groups` of them (Group DETR, arXiv 2207.13085): attention of a
    query stays within its group, and the first group is what the model has otherwise.
    """
    if not config.queries or "tokens" in inputs:
        return inputs
    images, groups = inputs["images"], config.query_groups if training else 1
    numbers_Q = torch.arange(groups * config.queries, device=images.device)
    numbers_BQ = numbers_Q.expand(len(images), -1)
    own = {"documents": numbers_BQ // config.queries} if groups > 1 else {}
    return inputs | {"tokens": numbers_BQ, "source": images} | own


def grid_sinusoids(places: int, width: int, like: Tensor) -> Tensor:
    """Return vectors of the places of a square grid, (P,D): sines and cosines of both coordinates.

    They are added to patches and queries alike, so that a query can find the patches near its
    place; from half a wave across the picture to one in two of 32 places.
    """
    precise = torch.promote_types(like.dtype, torch.float32)
    count = -(-width // 4)
    octaves = torch.arange(count, device=like.device, dtype=precise) * (5 / count)
    centre_P2 = patch_centres(round(places**0.5), octaves)
    angle_P2F = centre_P2[..., None] * (math.pi * 2.0**octaves)
    waves = torch.cat((angle_P2F.sin(), angle_P2F.cos()), -1).flatten(1)
    return waves[:, :width].to(like.dtype)
