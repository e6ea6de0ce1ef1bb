"""Parallelism of a model over ranks: strategies, device mesh, axes, job queue; torch only."""
