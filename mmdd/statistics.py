"""Means and cross-covariance of all pairs, in one pass over batches of any size.

What CovMatch estimates from one real batch, C^T and the means, is here that of the whole set. A
part of the set leaves one matrix (d_v, d_l) and two vectors behind, whatever its size, and two
parts can be joined: workers, or machines, each go over their own share of the pairs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from mmdd.errors import ConfigError


@dataclass(frozen=True)
class PairStatistics:
    """What is known of n pairs of features, all float64.

    count: n. mean_image: (d_v,), mean_text: (d_l,). moment: (d_v, d_l), the sum over pairs of
    (h_v - mean_image)(h_l - mean_text)ᵀ, not divided by anything.
    """

    count: int
    mean_image: Tensor
    mean_text: Tensor
    moment: Tensor

    def cross_covariance(self) -> Tensor:
        """C = moment / (n - 1), (d_v, d_l): the convention of `mmdd.losses.cross_covariance`.

        Raises `ConfigError` for fewer than two pairs, where it is undefined.

        Source: CovMatch (NeurIPS 2025), closed-form solution. Book: notebooks/14_efficiency.
        """
        if self.count < 2:
            raise ConfigError(f"a cross-covariance needs at least two pairs, not {self.count}.")
        return self.moment / (self.count - 1)


def pair_statistics(image: Tensor, text: Tensor) -> PairStatistics:
    """The statistics of one batch: image (m, d_v), text (m, d_l), m ≥ 1, row by row a pair.

    In float64, on the device of the features. Raises `ConfigError` for other shapes or no pair.
    Book: notebooks/14_efficiency.
    """
    if image.ndim != 2 or text.ndim != 2 or len(image) != len(text) or not len(image):
        raise ConfigError(
            "statistics of pairs need features (m, d_v) and (m, d_l) of at least one pair; got "
            f"{tuple(image.shape)} and {tuple(text.shape)}."
        )
    image, text = image.detach().double(), text.detach().double()
    mean_image, mean_text = image.mean(dim=0), text.mean(dim=0)
    moment = (image - mean_image).T @ (text - mean_text)
    return PairStatistics(len(image), mean_image, mean_text, moment)


def merge(a: PairStatistics, b: PairStatistics) -> PairStatistics:
    """The statistics of two disjoint sets of pairs together.

    With δ = mean_b - mean_a on each side: mean = mean_a + δ·n_b/n, and
    moment = moment_a + moment_b + δ_v δ_lᵀ · n_a·n_b/n. Nothing large is subtracted from anything
    large, so that features far from the origin lose no digits, as they do where Σ h_v h_lᵀ is
    summed and n·μ_v μ_lᵀ is taken off. Raises `ConfigError` where the widths differ.

    Source: Chan, Golub and LeVeque (1979), the update of two samples, for two sides.
    Book: notebooks/14_efficiency.
    """
    if a.moment.shape != b.moment.shape:
        raise ConfigError(
            "statistics of features of different widths cannot be merged: "
            f"{tuple(a.moment.shape)} and {tuple(b.moment.shape)}."
        )
    count = a.count + b.count
    delta_image, delta_text = b.mean_image - a.mean_image, b.mean_text - a.mean_text
    share = b.count / count
    moment = a.moment + b.moment
    moment.addr_(delta_image, delta_text, alpha=a.count * share)
    return PairStatistics(
        count, a.mean_image + share * delta_image, a.mean_text + share * delta_text, moment
    )


def streamed_statistics(batches: Iterable[tuple[Tensor, Tensor]]) -> PairStatistics:
    """The statistics of all pairs of a stream of batches, in one pass.

    batches: image and text features, (m, d_v) and (m, d_l), m may change. At any time three
    matrices (d_v, d_l) and one batch are held, however many pairs there are. Raises `ConfigError`
    for a stream without a batch. Book: notebooks/14_efficiency.
    """
    total = None
    for image, text in batches:
        batch = pair_statistics(image, text)
        total = batch if total is None else merge(total, batch)
    if total is None:
        raise ConfigError("there are no pairs to take statistics of.")
    return total
