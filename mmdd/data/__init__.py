"""Datasets: the embedded scenes, readers for the public sources, and the container they return."""

from mmdd.data.pairs import PairDataset

__all__ = ["PairDataset"]
