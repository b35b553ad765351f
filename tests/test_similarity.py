"""The ground-truth similarities: start, rows and columns at an index, gradients, storage."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdd.errors import ConfigError
from mmdd.similarity import (
    FullSimilarity,
    IdentitySimilarity,
    LowRankSimilarity,
    Similarity,
)


def make(kind: str, n: int, seed: int = 0) -> Similarity:
    """A similarity of the kind with learned-looking values."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "identity":
        return IdentitySimilarity(n)
    module = FullSimilarity(n) if kind == "full" else LowRankSimilarity(n, rank=2, alpha=3.0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


KINDS = ["identity", "full", "low_rank"]


@pytest.mark.parametrize(
    "module", [IdentitySimilarity(5), FullSimilarity(5), LowRankSimilarity(5, rank=3, alpha=7.0)]
)
def test_every_similarity_starts_as_the_identity(module: Similarity) -> None:
    assert torch.equal(module.matrix(), torch.eye(5))
    assert torch.equal(module.matrix(torch.tensor([4, 1])), torch.eye(2))


def test_low_rank_is_the_papers_formula() -> None:
    module = make("low_rank", 6)
    assert isinstance(module, LowRankSimilarity)
    omega, left, right = (
        p.detach().double().numpy() for p in (module.omega, module.left, module.right)
    )
    expected = np.zeros((6, 6))
    for i in range(6):
        for j in range(6):
            expected[i, j] = 3.0 / 2 * sum(left[i, k] * right[j, k] for k in range(2))
        expected[i, i] += omega[i]
    np.testing.assert_allclose(module.matrix().detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    residual = module.matrix() - torch.diag(module.omega)
    assert torch.linalg.matrix_rank(residual, rtol=1e-4).item() == 2


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), n=st.integers(1, 9))
@settings(deadline=None, max_examples=25)
def test_index_takes_rows_and_columns(kind: str, data: st.DataObject, n: int) -> None:
    # with repetitions and in any order: the same pair twice has equal rows and columns
    chosen = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=12))
    module, index = make(kind, n), torch.tensor(chosen)
    whole = module.matrix()
    expected = torch.stack([torch.stack([whole[i, j] for j in chosen]) for i in chosen])
    torch.testing.assert_close(module.matrix(index), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_gradient_reaches_only_the_pairs_of_the_batch(kind: str) -> None:
    module = make(kind, 6)
    module.matrix(torch.tensor([1, 4])).square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        rows = parameter.grad.reshape(6, -1).abs().sum(dim=1)
        assert rows[[1, 4]].gt(0).all()
        assert rows[[0, 2, 3, 5]].eq(0).all()


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_gradient_of_a_batch_is_that_of_the_whole_matrix(kind: str) -> None:
    index = torch.tensor([2, 0, 2, 5])
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    batch, whole = make(kind, 6), make(kind, 6)
    (batch.matrix(index) * weight).sum().backward()
    (whole.matrix()[index][:, index] * weight).sum().backward()
    for ours, theirs in zip(batch.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_low_rank_learns_from_its_start() -> None:
    # R = 0 stops the gradient of L, not that of R: training can leave the identity.
    module = LowRankSimilarity(4, rank=2, alpha=1.0)
    target = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    (module.matrix() - target).square().sum().backward()
    assert module.left.grad is not None
    assert module.right.grad is not None
    assert module.omega.grad is not None
    assert module.left.grad.abs().sum() == 0
    assert module.right.grad.abs().sum() > 0
    assert module.omega.grad.abs().sum() > 0


def test_stored_numbers() -> None:
    def stored(module: Similarity) -> int:
        return sum(value.numel() for value in module.state_dict().values())

    assert stored(IdentitySimilarity(100)) == 0
    assert stored(FullSimilarity(100)) == 100 * 100
    assert stored(LowRankSimilarity(100, rank=10, alpha=1.0)) == 100 * (2 * 10 + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_and_device_follow_the_module(kind: str) -> None:
    assert make(kind, 3).double().matrix().dtype == torch.float64
    assert make(kind, 3).double().matrix(torch.tensor([0, 2])).dtype == torch.float64
    assert make(kind, 3).to("meta").matrix().device.type == "meta"


@pytest.mark.parametrize(
    "build",
    [
        lambda: IdentitySimilarity(0),
        lambda: FullSimilarity(-1),
        lambda: LowRankSimilarity(0, rank=1, alpha=1.0),
        lambda: LowRankSimilarity(3, rank=0, alpha=1.0),
    ],
)
def test_impossible_sizes_are_refused(build: object) -> None:
    assert callable(build)
    with pytest.raises(ConfigError, match="at least"):
        build()
