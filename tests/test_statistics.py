"""Statistics of all pairs from parts of them: the same numbers as from all at once."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdd import losses
from mmdd.errors import ConfigError
from mmdd.statistics import PairStatistics, merge, pair_statistics, streamed_statistics

P, Q = 12, 7


def features(n: int, seed: int = 0, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features of n pairs, (n, P) and (n, Q), `offset` away from the origin."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(n, P))
    text = image @ rng.normal(size=(P, Q)) + rng.normal(size=(n, Q))
    return image + offset, text - 2 * offset


def direct(image: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means and cross-covariance by numpy, of all pairs at once."""
    covariance = np.cov(image, text, rowvar=False)[: image.shape[1], image.shape[1] :]
    return image.mean(axis=0), text.mean(axis=0), covariance


def parts(image: np.ndarray, text: np.ndarray, cuts: list[int]) -> list[tuple]:
    ends = [0, *sorted(cuts), len(image)]
    return [
        (torch.from_numpy(image[a:b]), torch.from_numpy(text[a:b]))
        for a, b in pairwise(ends)
        if b > a
    ]


def assert_direct(found: PairStatistics, image: np.ndarray, text: np.ndarray, tol: float) -> None:
    assert found.count == len(image)
    ours = found.mean_image, found.mean_text, found.cross_covariance()
    for a, b in zip(ours, direct(image, text), strict=True):
        assert a.dtype == torch.float64
        np.testing.assert_allclose(a.numpy(), b, rtol=tol, atol=tol)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(2, 60),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    seed=st.integers(0, 99),
)
def test_any_cut_gives_the_direct_formula(n: int, cuts: list[int], seed: int) -> None:
    image, text = features(n, seed)
    stream = parts(image, text, [min(c, n) for c in cuts])
    assert_direct(streamed_statistics(stream), image, text, 1e-10)


def test_the_convention_is_that_of_the_loss() -> None:
    image, text = (torch.from_numpy(x) for x in features(50))
    found = streamed_statistics(zip(image.split(8), text.split(8), strict=True))
    torch.testing.assert_close(
        found.cross_covariance(), losses.cross_covariance(image, text), rtol=0, atol=1e-12
    )


def test_float32_features_are_summed_in_float64() -> None:
    image, text = (x.astype(np.float32) for x in features(20_000, offset=30.0))
    found = streamed_statistics(parts(image, text, list(range(0, 20_000, 7))))
    assert_direct(found, image.astype(np.float64), text.astype(np.float64), 1e-10)


def test_features_far_from_the_origin_lose_no_digits() -> None:
    image, text = features(5_000, offset=1e7)
    found = streamed_statistics(parts(image, text, list(range(0, 5_000, 64))))
    exact = direct(image - 1e7, text + 2e7)[2]  # these differences are what the features hold
    error = np.abs(found.cross_covariance().numpy() - exact).max()
    summed = (image.T @ text - 5_000 * np.outer(image.mean(0), text.mean(0))) / 4_999
    assert error < 1e-7 < 1e-3 < np.abs(summed - exact).max()


def test_a_merge_changes_neither_part_and_has_no_order() -> None:
    image, text = features(40)
    a, b, c = (pair_statistics(*part) for part in parts(image, text, [3, 25]))
    before = [t.clone() for t in (a.mean_image, a.moment, b.mean_image, b.moment)]
    for found in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(merge(c, a), b)):
        assert_direct(found, image, text, 1e-12)
    for old, new in zip(before, (a.mean_image, a.moment, b.mean_image, b.moment), strict=True):
        assert torch.equal(old, new)


def test_what_is_held_does_not_grow_with_the_pairs() -> None:
    few, many = (streamed_statistics(parts(*features(n), [])) for n in (3, 3_000))
    for a, b in zip(vars(few).values(), vars(many).values(), strict=True):
        assert isinstance(a, int) or a.shape == b.shape


def _share(seed: int, batch: int) -> PairStatistics:
    """What a worker does: makes its own share of the pairs and goes over it in batches."""
    image, text = (torch.from_numpy(x) for x in features(3_000 + seed, seed, offset=5.0))
    return streamed_statistics(zip(image.split(batch), text.split(batch), strict=True))


@pytest.mark.slow
def test_two_workers_of_a_cluster_give_the_direct_formula() -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        workers = list(client.scheduler_info()["workers"])
        shares = [
            client.submit(_share, seed, 64 + seed, workers=[workers[seed % 2]], pure=False)
            for seed in range(4)
        ]
        first, second = (  # each worker joins its own, and what travels is the sums
            client.submit(merge, shares[i], shares[i + 2], workers=[workers[i]]) for i in (0, 1)
        )
        found = client.submit(merge, first, second).result()
        held = {key: set(where) for key, where in client.who_has([first, second]).items()}
    assert len(set.union(*held.values())) == 2  # two processes did the work
    given = [features(3_000 + seed, seed, offset=5.0) for seed in range(4)]
    image, text = (np.concatenate(side) for side in zip(*given, strict=True))
    assert_direct(found, image, text, 1e-10)


@pytest.mark.parametrize(
    ("image", "text"),
    [((0, 3), (0, 2)), ((4, 3), (5, 2)), ((4,), (4,)), ((4, 3, 1), (4, 2))],
)
def test_shapes_that_are_no_pairs(image: tuple[int, ...], text: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="at least one pair"):
        pair_statistics(torch.zeros(image), torch.zeros(text))


def test_what_cannot_be_merged_or_divided() -> None:
    one = pair_statistics(torch.zeros(1, 3), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="at least two pairs, not 1"):
        one.cross_covariance()
    with pytest.raises(ConfigError, match="different widths"):
        merge(one, pair_statistics(torch.zeros(1, 4), torch.zeros(1, 2)))
    with pytest.raises(ConfigError, match="no pairs"):
        streamed_statistics([])


def test_an_error_of_the_stream_is_its_own() -> None:
    def broken():
        yield torch.zeros(2, 3), torch.zeros(2, 2)
        raise TypeError("the reader broke")

    with pytest.raises(TypeError, match="the reader broke"):
        streamed_statistics(broken())
