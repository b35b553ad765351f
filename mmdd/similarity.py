"""The ground-truth similarity S̃ between synthetic images and texts: identity, full or low rank."""

import torch
from torch import Tensor, nn

from mmdd.errors import ConfigError


class IdentitySimilarity(nn.Module):
    """Image i belongs to text i alone; nothing to learn. Book: notebooks/06_lors."""

    kind = "identity"
    _one: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        _require_size(n)
        self.n = n
        self.register_buffer("_one", torch.ones(()), persistent=False)  # carries device and dtype

    def matrix(self, index: Tensor | None = None) -> Tensor:
        """The (n, n) matrix, or its rows and columns at `index` (k,) int64: (k, k)."""
        size = self.n if index is None else len(index)
        eye = torch.eye(size, dtype=self._one.dtype, device=self._one.device)
        if index is None:
            return eye
        # A repeated index is the same pair twice: its rows and columns repeat too.
        return (index[:, None] == index[None, :]).to(eye)


class FullSimilarity(nn.Module):
    """Every entry of the (n, n) matrix learned, starting from the identity.

    Source: LoRS (ICML 2024) §3.3. Book: notebooks/06_lors.
    """

    kind = "full"

    def __init__(self, n: int) -> None:
        super().__init__()
        _require_size(n)
        self.n = n
        self.values = nn.Parameter(torch.eye(n))

    def matrix(self, index: Tensor | None = None) -> Tensor:
        """The (n, n) matrix, or its rows and columns at `index` (k,) int64: (k, k)."""
        return self.values if index is None else self.values[index][:, index]


class LowRankSimilarity(nn.Module):
    """diag(ω) + (alpha / rank) L Rᵀ, the identity at the start: ω = 1, L ~ N(0, 1), R = 0.

    n: pairs; rank: columns of L and R; alpha: weight of the residual.
    Source: LoRS (ICML 2024) §3.4. Book: notebooks/06_lors.
    """

    kind = "low_rank"

    def __init__(self, n: int, rank: int, alpha: float) -> None:
        super().__init__()
        _require_size(n)
        if rank < 1:
            raise ConfigError(f"LowRankSimilarity: rank must be at least 1, not {rank}.")
        self.n, self.rank, self.alpha = n, rank, alpha
        self.omega = nn.Parameter(torch.ones(n))
        self.left = nn.Parameter(torch.randn(n, rank))
        self.right = nn.Parameter(torch.zeros(n, rank))

    def matrix(self, index: Tensor | None = None) -> Tensor:
        """The (n, n) matrix, or its rows and columns at `index` (k,) int64: (k, k)."""
        scale = self.alpha / self.rank
        if index is None:
            return torch.diag(self.omega) + scale * self.left @ self.right.T
        same = index[:, None] == index[None, :]
        diagonal = torch.where(same, self.omega[index][:, None], self.omega.new_zeros(()))
        return diagonal + scale * self.left[index] @ self.right[index].T


Similarity = IdentitySimilarity | FullSimilarity | LowRankSimilarity


def _require_size(n: int) -> None:
    if n < 1:
        raise ConfigError(f"a similarity needs at least one pair, not {n}.")
