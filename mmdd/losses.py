"""Losses as pure functions of features or logits; they know no data, model or device.

Shapes: m pairs, d the shared dimension, d_v and d_l the widths of image and text features.
Features are (m, d) float tensors, L2-normalised unless a function says otherwise; every function
returns a scalar tensor, except those that map features to features.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdd.errors import ConfigError

LossName = Literal["info_nce", "ence", "bce", "wbce"]
KernelName = Literal["geodesic", "chordal", "laplacian"]


def info_nce(z_image: Tensor, z_text: Tensor, temperature: float | Tensor = 0.07) -> Tensor:
    """InfoNCE, the mean of the image→text and the text→image direction.

    z_image, z_text: (m, d), L2-normalised. The LoRS paper's Eq. 1 adds the two directions; its
    code, and this function, average them.

    Source: LoRS (ICML 2024) Eq. 1. Book: notebooks/04_linear_contrastive.
    """
    _require_pairs("info_nce", z_image, z_text)
    logits = z_image @ z_text.T / temperature  # (m, m)
    # The same operations as eNCE's, so that the two agree to the last bit at the identity.
    return extended_info_nce(
        logits, torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    )


def extended_info_nce(logits: Tensor, similarity: Tensor) -> Tensor:
    """eNCE: InfoNCE with a soft ground truth. Equals `info_nce` where similarity is the identity.

    logits, similarity: (m, m); logits = z_image @ z_text.T / temperature. Averaged over the two
    directions, as the authors' code does; the paper's Eq. 3 adds them.

    Source: LoRS Eq. 3. Book: notebooks/06_lors.
    """
    _require_logits("extended_info_nce", logits, similarity)
    log_p = F.log_softmax(logits, dim=1) + F.log_softmax(logits, dim=0)  # P^V over rows, P^T
    return -0.5 * (similarity * log_p).sum() / len(logits)


def binary_cross_entropy(logits: Tensor, similarity: Tensor) -> Tensor:
    """BCE between sigmoid(logits) and the similarity, averaged over all m² entries.

    logits, similarity: (m, m). Computed from log-sigmoids, so that it stays finite and keeps its
    gradient for confident mistakes; similarities outside [0, 1] are taken as they are.

    Source: LoRS Eq. 4. Book: notebooks/06_lors.
    """
    _require_logits("binary_cross_entropy", logits, similarity)
    return _bce_terms(logits, similarity).mean()


def weighted_binary_cross_entropy(
    logits: Tensor, similarity: Tensor, threshold: float = 0.5
) -> Tensor:
    """wBCE: positives and negatives averaged separately, then averaged.

    logits, similarity: (m, m); an entry is positive where similarity > threshold. The paper's Eq. 5
    adds the two means; the authors' code, and this function, halve the sum. A side without entries
    contributes 0.

    Source: LoRS Eq. 5. Book: notebooks/06_lors.
    """
    _require_logits("weighted_binary_cross_entropy", logits, similarity)
    terms = _bce_terms(logits, similarity)
    positive = (similarity > threshold).to(terms.dtype)
    negative = 1 - positive
    mean_positive = (terms * positive).sum() / positive.sum().clamp(min=1)
    mean_negative = (terms * negative).sum() / negative.sum().clamp(min=1)
    return 0.5 * (mean_positive + mean_negative)


def _bce_terms(logits: Tensor, similarity: Tensor) -> Tensor:
    # -y log p - (1 - y) log(1 - p), with log(1 - sigmoid(x)) = logsigmoid(-x).
    return -similarity * F.logsigmoid(logits) - (1 - similarity) * F.logsigmoid(-logits)


def contrastive_loss(
    name: LossName, z_image: Tensor, z_text: Tensor, temperature: float, similarity: Tensor | None
) -> Tensor:
    """A loss by name on L2-normalised features (m, d).

    similarity: (m, m), or None for the identity; "info_nce" knows no other and ignores it. Raises
    `ConfigError` for an unknown name. Book: notebooks/06_lors.
    """
    if name == "info_nce":
        return info_nce(z_image, z_text, temperature)
    functions = {
        "ence": extended_info_nce,
        "bce": binary_cross_entropy,
        "wbce": weighted_binary_cross_entropy,
    }
    if name not in functions:
        raise ConfigError(f"unknown loss {name!r}; known: info_nce, {', '.join(functions)}.")
    if similarity is None:
        similarity = torch.eye(len(z_image), device=z_image.device, dtype=z_image.dtype)
    return functions[name](z_image @ z_text.T / temperature, similarity)


def cross_covariance(a: Tensor, b: Tensor) -> Tensor:
    """Cross-covariance of two feature sets: (m, p), (m, q) → (p, q), divided by m - 1.

    Raises `ConfigError` for fewer than two rows, where it is undefined.

    Source: CovMatch (NeurIPS 2025), closed-form solution. Book: notebooks/04_linear_contrastive.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ConfigError(
            f"cross_covariance needs the same number of rows, at least two, in both sets; "
            f"got {len(a)} and {len(b)}."
        )
    a_centred = a - a.mean(dim=0, keepdim=True)
    b_centred = b - b.mean(dim=0, keepdim=True)
    return a_centred.T @ b_centred / (len(a) - 1)


def linear_contrastive(
    h_image: Tensor, h_text: Tensor, G_image: Tensor, G_text: Tensor, rho: float
) -> Tensor:
    """The linearised contrastive loss of fixed features and trainable projections.

    h_image: (m, d_v), h_text: (m, d_l), not normalised; G_image: (d, d_v), G_text: (d, d_l).
    With s_ij = (G_image h_image_i) · (G_text h_text_j), the mean over ordered pairs i ≠ j of
    ((s_ij - s_ii) + (s_ji - s_ii)) / 2, plus rho / 2 · ‖G_imageᵀ G_text‖_F². Computed from the
    scores; `-Tr(G_v C G_lᵀ) + rho/2 ‖·‖²` with the cross-covariance C is the same number.

    Source: CovMatch (NeurIPS 2025), linear contrastive loss. Book: notebooks/04_linear_contrastive.
    """
    m = len(h_image)
    if m != len(h_text) or m < 2:
        raise ConfigError(
            f"linear_contrastive needs equally many image and text features, at least two; "
            f"got {m} and {len(h_text)}."
        )
    scores = (h_image @ G_image.T) @ (h_text @ G_text.T).T  # (m, m)
    off_diagonal = scores.sum() - scores.diagonal().sum()
    contrast = (off_diagonal - (m - 1) * scores.diagonal().sum()) / (m * (m - 1))
    product = G_image.T @ G_text  # (d_v, d_l)
    return contrast + 0.5 * rho * product.square().sum()


def covmatch(
    real_image: Tensor,
    real_text: Tensor,
    syn_image: Tensor,
    syn_text: Tensor,
    rho: float,
    lambda_: float,
) -> Tensor:
    """CovMatch: ‖rho·C_real - C_syn‖_F² + lambda_ · (squared distances of the feature means).

    real_*: (m, d), syn_*: (n, d) projected features, not normalised; m, n ≥ 2.

    Source: CovMatch (NeurIPS 2025), L^cov and feature matching. Book: notebooks/07_covmatch.
    """
    covariance, means = covmatch_terms(real_image, real_text, syn_image, syn_text, rho)
    return covariance + lambda_ * means


def covmatch_terms(
    real_image: Tensor, real_text: Tensor, syn_image: Tensor, syn_text: Tensor, rho: float
) -> tuple[Tensor, Tensor]:
    """The two terms of `covmatch`, covariance and means, before they are weighted."""
    difference = rho * cross_covariance(real_image, real_text) - cross_covariance(
        syn_image, syn_text
    )
    mean_image = real_image.mean(dim=0) - syn_image.mean(dim=0)
    mean_text = real_text.mean(dim=0) - syn_text.mean(dim=0)
    return difference.square().sum(), mean_image.square().sum() + mean_text.square().sum()


def agreement(z_image: Tensor, z_text: Tensor) -> Tensor:
    """Unit vectors along z_image + z_text: (m, d) → (m, d).

    Source: MDM (CVPR 2026), agreement feature u. Book: notebooks/08_mdm.
    """
    return F.normalize(z_image + z_text, dim=-1)


def discrepancy(z_image: Tensor, z_text: Tensor) -> Tensor:
    """Unit vectors along z_image - z_text: (m, d) → (m, d).

    Source: MDM (CVPR 2026), discrepancy feature g. Book: notebooks/08_mdm.
    """
    return F.normalize(z_image - z_text, dim=-1)


def geodesic_kernel_energy(a: Tensor, b: Tensor, sigma: float = 0.5) -> Tensor:
    """Distance of two sets of unit vectors under the geodesic kernel exp(-angle²/(2 sigma²)).

    a: (m, d), b: (n, d), L2-normalised. The square root of the V-statistic: mean k(a, a) +
    mean k(b, b) - 2 mean k(a, b), diagonals included; 0 for equal sets. The cosines are clamped
    a hair inside [-1, 1], where arccos has a finite slope, and the root is guarded at 0, so that
    value and gradient stay finite for identical and antipodal points.

    Source: MDM (CVPR 2026), geodesic kernel energy. Book: notebooks/08_mdm.
    """
    return kernel_energy(a, b, sigma, "geodesic")


def kernel_energy(
    a: Tensor, b: Tensor, sigma: float = 0.5, kernel: KernelName = "geodesic"
) -> Tensor:
    """Distance of two sets of unit vectors under a kernel: see `geodesic_kernel_energy`.

    a: (m, d), b: (n, d), L2-normalised. "chordal" is exp(-|x - y|²/(2 sigma²)), the geodesic kernel
    with the chord in place of the angle; "laplacian" is exp(-|x - y|/sigma). Raises `ConfigError`
    for another name, a set without points, or widths that differ.

    Source: MDM (CVPR 2026), ablation of the kernel. Book: notebooks/08_mdm.
    """
    if kernel not in _KERNELS:
        raise ConfigError(f"unknown kernel {kernel!r}; known: {', '.join(_KERNELS)}.")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or 0 in (len(a), len(b)):
        raise ConfigError(
            f"an energy needs two sets of vectors of one width, each of at least one; "
            f"got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    k = _KERNELS[kernel]
    squared = k(a, a, sigma).mean() + k(b, b, sigma).mean() - 2 * k(a, b, sigma).mean()
    # Below this the value is rounding noise of the three means; the gradient there is taken as 0.
    floor = 4 * torch.finfo(squared.dtype).eps
    safe = torch.where(squared > floor, squared, torch.ones_like(squared))
    return torch.where(squared > floor, safe.sqrt(), torch.zeros_like(squared))


def _geodesic_kernel(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    cosine = a @ b.T
    limit = 1 - 4 * torch.finfo(cosine.dtype).eps
    inside = cosine.clamp(-limit, limit)
    angle = torch.arccos(inside)
    # Past the clamp the angle is a constant: exactly 0 at +1, exactly π at -1.
    angle = torch.where(cosine >= limit, torch.zeros_like(angle), angle)
    angle = torch.where(cosine <= -limit, torch.full_like(angle, torch.pi), angle)
    return torch.exp(-angle.square() / (2 * sigma**2))


def _squared_chord(a: Tensor, b: Tensor) -> Tensor:
    return (2 - 2 * (a @ b.T)).clamp(min=0)


def _chordal_kernel(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    return torch.exp(-_squared_chord(a, b) / (2 * sigma**2))


def _laplacian_kernel(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    squared = _squared_chord(a, b)
    # The root has an infinite slope at 0; there the two points count as one, without a gradient.
    floor = 8 * torch.finfo(squared.dtype).eps
    safe = torch.where(squared > floor, squared, torch.ones_like(squared))
    distance = torch.where(squared > floor, safe.sqrt(), torch.zeros_like(squared))
    return torch.exp(-distance / sigma)


_KERNELS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "geodesic": _geodesic_kernel,
    "chordal": _chordal_kernel,
    "laplacian": _laplacian_kernel,
}


def trajectory_distance(student: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """‖student - target‖² / ‖start - target‖² of flat parameter vectors, (p,) each.

    Raises `ConfigError` when start equals target: the expert did not move.

    Source: MTT (CVPR 2022); LoRS Eq. 2. Book: notebooks/05_trajectory_matching.
    """
    if (start - target).square().sum() == 0:
        raise ConfigError(
            "trajectory_distance: the expert did not move between start and target; "
            "choose snapshots further apart."
        )
    return relative_distance(student, target, start)


def relative_distance(student: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """`trajectory_distance` unchecked, as a check makes the host wait for its device.

    Not finite when start equals target. Book: notebooks/05_trajectory_matching.
    """
    return (student - target).square().sum() / (start - target).square().sum()


def _require_pairs(name: str, z_image: Tensor, z_text: Tensor) -> None:
    if z_image.ndim != 2 or z_image.shape != z_text.shape or len(z_image) == 0:
        raise ConfigError(
            f"{name} needs two (m, d) tensors of the same shape, m ≥ 1; "
            f"got {tuple(z_image.shape)} and {tuple(z_text.shape)}."
        )


def _require_logits(name: str, logits: Tensor, similarity: Tensor) -> None:
    square = logits.ndim == 2 and logits.shape[0] == logits.shape[1] > 0
    if not square or logits.shape != similarity.shape:
        raise ConfigError(
            f"{name} needs logits and similarity of the same (m, m) shape, m ≥ 1; "
            f"got {tuple(logits.shape)} and {tuple(similarity.shape)}."
        )
