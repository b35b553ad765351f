"""Every loss against a second computation: explicit loops in numpy float64, analytic gradients."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmdd import losses
from mmdd.errors import ConfigError

SIZES = [(1, 3), (2, 2), (5, 8), (9, 4)]
TEMPERATURES = [0.07, 0.5, 3.0]


def unit(rng: np.random.Generator, m: int, d: int) -> np.ndarray:
    z = rng.normal(size=(m, d))
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def tensor(array: np.ndarray, *, grad: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(array, dtype=dtype, requires_grad=grad)


def softmaxes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P^V (over rows) and P^T (over columns) with one loop per entry."""
    m = len(x)
    p_v, p_t = np.empty((m, m)), np.empty((m, m))
    for i in range(m):
        for j in range(m):
            p_v[i, j] = 1 / sum(math.exp(x[i, k] - x[i, j]) for k in range(m))
            p_t[i, j] = 1 / sum(math.exp(x[k, j] - x[i, j]) for k in range(m))
    return p_v, p_t


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def soft_plus(x: float) -> float:
    """log(1 + e^x), exact for any x."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def grad_of(value: Tensor, *inputs: Tensor) -> list[np.ndarray]:
    return [g.numpy() for g in torch.autograd.grad(value, inputs)]


# ---- InfoNCE, eNCE -----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("m", "d"), SIZES)
def test_info_nce_value_and_proposition_3_1(m: int, d: int, temperature: float) -> None:
    rng = np.random.default_rng([m, d])
    u, v = unit(rng, m, d), unit(rng, m, d)
    z_image, z_text = tensor(u, grad=True), tensor(v, grad=True)
    loss = losses.info_nce(z_image, z_text, temperature)

    p_v, p_t = softmaxes(u @ v.T / temperature)
    expected = -sum(math.log(p_v[i, i]) + math.log(p_t[i, i]) for i in range(m)) / (2 * m)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-13)

    # LoRS Proposition 3.1, halved because the two directions are averaged here.
    grad_image, grad_text = grad_of(loss, z_image, z_text)
    weights = np.empty((m, m))
    for n in range(m):
        for j in range(m):
            weights[n, j] = (p_v[n, j] + p_t[n, j] - (2 if j == n else 0)) / (m * temperature)
    np.testing.assert_allclose(grad_image, 0.5 * weights @ v, atol=1e-12)
    np.testing.assert_allclose(grad_text, 0.5 * weights.T @ u, atol=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("m", "d"), SIZES)
def test_extended_info_nce_value_and_proposition_3_2(m: int, d: int, temperature: float) -> None:
    rng = np.random.default_rng([1, m, d])
    u, v = unit(rng, m, d), unit(rng, m, d)
    s = rng.normal(size=(m, m))  # learned similarities may leave [0, 1]
    z_image, z_text = tensor(u, grad=True), tensor(v, grad=True)
    similarity = tensor(s, grad=True)
    loss = losses.extended_info_nce(z_image @ z_text.T / temperature, similarity)

    p_v, p_t = softmaxes(u @ v.T / temperature)
    log_p = np.log(p_v) + np.log(p_t)
    expected = -sum(s[i, j] * log_p[i, j] for i in range(m) for j in range(m)) / (2 * m)
    assert loss.item() == pytest.approx(expected, rel=1e-11, abs=1e-12)

    grad_image, grad_text, grad_similarity = grad_of(loss, z_image, z_text, similarity)
    weights = np.empty((m, m))
    for n in range(m):
        for j in range(m):
            marginals = s[n].sum() * p_v[n, j] + s[:, j].sum() * p_t[n, j]
            weights[n, j] = (marginals - 2 * s[n, j]) / (m * temperature)
    np.testing.assert_allclose(grad_image, 0.5 * weights @ v, atol=1e-11)
    np.testing.assert_allclose(grad_text, 0.5 * weights.T @ u, atol=1e-11)
    np.testing.assert_allclose(grad_similarity, -log_p / (2 * m), atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extended_info_nce_at_the_identity_is_info_nce(dtype: torch.dtype) -> None:
    """To the last bit, value and gradient."""
    rng = np.random.default_rng(3)
    for m in range(1, 40):
        leaves = [tensor(unit(rng, m, 8), dtype=dtype).requires_grad_() for _ in range(2)]
        plain = losses.info_nce(*leaves, 0.07)
        logits = leaves[0] @ leaves[1].T / 0.07
        extended = losses.extended_info_nce(logits, torch.eye(m, dtype=dtype))
        assert torch.equal(extended, plain)
        expected = torch.autograd.grad(plain, leaves)
        for a, b in zip(torch.autograd.grad(extended, leaves), expected, strict=True):
            assert torch.equal(a, b)


def test_info_nce_is_symmetric_and_ignores_the_order_of_pairs() -> None:
    rng = np.random.default_rng(4)
    z_image, z_text = tensor(unit(rng, 7, 5)), tensor(unit(rng, 7, 5))
    value = losses.info_nce(z_image, z_text).item()
    order = torch.tensor(rng.permutation(7))
    assert losses.info_nce(z_text, z_image).item() == pytest.approx(value, rel=1e-12)
    assert losses.info_nce(z_image[order], z_text[order]).item() == pytest.approx(value, rel=1e-12)


def test_info_nce_of_a_collapsed_model_is_log_m_and_of_one_pair_zero() -> None:
    collapsed = torch.ones(6, 4, dtype=torch.float64) / 2
    assert losses.info_nce(collapsed, collapsed).item() == pytest.approx(math.log(6), rel=1e-12)
    assert losses.info_nce(collapsed[:1], collapsed[:1]).item() == 0


def test_info_nce_passes_the_gradient_of_a_learned_temperature() -> None:
    rng = np.random.default_rng(5)
    z_image, z_text = tensor(unit(rng, 4, 3)), tensor(unit(rng, 4, 3))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: losses.info_nce(z_image, z_text, t), temperature)


# ---- BCE, wBCE ---------------------------------------------------------------------------------


def bce_entry(y: float, x: float) -> float:
    # -y log σ(x) - (1 - y) log σ(-x)
    return y * soft_plus(-x) + (1 - y) * soft_plus(x)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("m", "d"), SIZES)
def test_binary_cross_entropy_value_and_proposition_3_3(m: int, d: int, temperature: float) -> None:
    rng = np.random.default_rng([2, m, d])
    u, v = unit(rng, m, d), unit(rng, m, d)
    s = rng.normal(0.5, 1, size=(m, m))
    z_image, z_text = tensor(u, grad=True), tensor(v, grad=True)
    loss = losses.binary_cross_entropy(z_image @ z_text.T / temperature, tensor(s))

    x = u @ v.T / temperature
    total = sum(bce_entry(s[i, j], x[i, j]) for i in range(m) for j in range(m))
    assert loss.item() == pytest.approx(total / m**2, rel=1e-12)

    # The proposition divides by m; the loss, and Eq. 4, average over all m² entries.
    weights = np.empty((m, m))
    for n in range(m):
        for j in range(m):
            weights[n, j] = (sigmoid(x[n, j]) - s[n, j]) / (m**2 * temperature)
    grad_image, grad_text = grad_of(loss, z_image, z_text)
    np.testing.assert_allclose(grad_image, weights @ v, atol=1e-12)
    np.testing.assert_allclose(grad_text, weights.T @ u, atol=1e-12)


@pytest.mark.parametrize("threshold", [0.2, 0.5])
@pytest.mark.parametrize(("m", "d"), SIZES)
def test_weighted_binary_cross_entropy_value_and_gradient(m: int, d: int, threshold: float) -> None:
    rng = np.random.default_rng([3, m, d])
    x = 3 * rng.normal(size=(m, m))
    s = rng.uniform(-0.3, 1.3, size=(m, m))
    logits, similarity = tensor(x, grad=True), tensor(s, grad=True)
    loss = losses.weighted_binary_cross_entropy(logits, similarity, threshold)

    entries = [(i, j) for i in range(m) for j in range(m)]
    positive = [e for e in entries if s[e] > threshold]
    negative = [e for e in entries if s[e] <= threshold]
    expected, by_logit, by_similarity = 0.0, np.zeros((m, m)), np.zeros((m, m))
    for side in (positive, negative):
        for e in side:
            weight = 0.5 / len(side)
            expected += weight * bce_entry(s[e], x[e])
            by_logit[e] = weight * (sigmoid(x[e]) - s[e])
            by_similarity[e] = -weight * x[e]
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    grad_logits, grad_similarity = grad_of(loss, logits, similarity)
    np.testing.assert_allclose(grad_logits, by_logit, atol=1e-13)
    np.testing.assert_allclose(grad_similarity, by_similarity, atol=1e-13)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_weighted_binary_cross_entropy_with_one_empty_side(fill: float) -> None:
    x = np.random.default_rng(0).normal(size=(4, 4))
    logits = tensor(x, grad=True)
    loss = losses.weighted_binary_cross_entropy(logits, torch.full((4, 4), fill).double())
    terms = [bce_entry(fill, value) for value in x.ravel()]
    assert loss.item() == pytest.approx(0.5 * np.mean(terms), rel=1e-12)
    (gradient,) = grad_of(loss, logits)
    assert np.isfinite(gradient).all()
    assert (gradient != 0).all()


def test_weighted_binary_cross_entropy_does_not_drown_the_positives() -> None:
    # All logits 0: each entry costs log 2, so the loss is log 2 at every size; and the m diagonal
    # entries together weigh as much as the m² - m others.
    for m in (2, 10, 50):
        logits = torch.zeros(m, m, dtype=torch.float64, requires_grad=True)
        loss = losses.weighted_binary_cross_entropy(logits, torch.eye(m, dtype=torch.float64))
        assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
        (gradient,) = grad_of(loss, logits)
        assert -np.trace(gradient) == pytest.approx(gradient.sum() - np.trace(gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "loss", [losses.binary_cross_entropy, losses.weighted_binary_cross_entropy]
)
def test_bce_at_extreme_logits_keeps_value_and_gradient(
    loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    # A confident mistake (logit 50 with similarity 0) must cost 50 and pull with full strength;
    # log(p + 1e-6) would cap it at 13.8 with a gradient near 0.
    x = np.array([[50.0, -50.0], [50.0, -50.0]])
    s = np.array([[0.0, 1.0], [1.5, -0.5]])
    logits, similarity = tensor(x, grad=True, dtype=dtype), tensor(s, grad=True, dtype=dtype)
    value = loss(logits, similarity)
    costs = [bce_entry(y, z) for y, z in zip(s.ravel(), x.ravel(), strict=True)]
    assert costs[:2] == pytest.approx([50, 50])
    # two positives and two negatives: both losses are the plain mean
    assert value.item() == pytest.approx(np.mean(costs), rel=1e-6)
    grad_logits, grad_similarity = grad_of(value, logits, similarity)
    np.testing.assert_allclose(grad_logits, [[0.25, -0.25], [-0.125, 0.125]], rtol=1e-6)
    np.testing.assert_allclose(grad_similarity, -x / 4, rtol=1e-6)


# ---- cross-covariance and the linearised loss --------------------------------------------------


@given(m=st.integers(2, 12), p=st.integers(1, 5), q=st.integers(1, 5), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=30)
def test_cross_covariance_is_numpys(m: int, p: int, q: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(3, 2, size=(m, p)), rng.normal(-1, 1, size=(m, q))
    ours = losses.cross_covariance(tensor(a), tensor(b)).numpy()
    np.testing.assert_allclose(ours, np.cov(a.T, b.T)[:p, p:], atol=1e-12)
    shifted = losses.cross_covariance(tensor(a + 7), tensor(b - 4)).numpy()
    np.testing.assert_allclose(shifted, ours, atol=1e-12)
    swapped = losses.cross_covariance(tensor(b), tensor(a)).numpy()
    np.testing.assert_allclose(swapped, ours.T, atol=1e-12)


class Linear:
    """Random features and projections for the linearised loss, as numpy arrays and tensors."""

    def __init__(self, m: int = 6, d: int = 3, d_v: int = 5, d_l: int = 4, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, m, d, d_v, d_l])
        self.arrays = [
            rng.normal(1, 1, size=(m, d_v)),
            rng.normal(-2, 1, size=(m, d_l)),
            rng.normal(size=(d, d_v)),
            rng.normal(size=(d, d_l)),
        ]
        self.tensors = [tensor(array, grad=True) for array in self.arrays]


@pytest.mark.parametrize("rho", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (6, 3, 5, 4), (5, 8, 3, 6)])
def test_linear_contrastive_is_the_pair_sum_and_the_trace(
    shape: tuple[int, int, int, int], rho: float
) -> None:
    case = Linear(*shape)
    h_v, h_l, g_v, g_l = case.arrays
    m = len(h_v)
    ours = losses.linear_contrastive(*case.tensors, rho).item()

    def s(i: int, j: int) -> float:
        return float((g_v @ h_v[i]) @ (g_l @ h_l[j]))

    pair_sum = 0.0
    for i in range(m):
        for j in range(m):
            if j != i:
                pair_sum += (s(i, j) - s(i, i)) + (s(j, i) - s(i, i))
    penalty = 0.5 * rho * sum(x**2 for x in (g_v.T @ g_l).ravel())
    assert ours == pytest.approx(pair_sum / (2 * m * (m - 1)) + penalty, rel=1e-10)

    covariance = sum(
        np.outer(h_v[i] - h_v.mean(axis=0), h_l[i] - h_l.mean(axis=0)) for i in range(m)
    ) / (m - 1)
    assert ours == pytest.approx(-np.trace(g_v @ covariance @ g_l.T) + penalty, rel=1e-10)


@pytest.mark.parametrize("rho", [0.0, 1.0, 2.5])
def test_linear_contrastive_gradient(rho: float) -> None:
    case = Linear(seed=1)
    h_v, h_l, g_v, g_l = case.arrays
    m = len(h_v)
    by_h_v, by_h_l, by_g_v, by_g_l = grad_of(
        losses.linear_contrastive(*case.tensors, rho), *case.tensors
    )
    c_v, c_l = h_v - h_v.mean(axis=0), h_l - h_l.mean(axis=0)
    covariance = c_v.T @ c_l / (m - 1)
    np.testing.assert_allclose(by_g_v, -g_l @ covariance.T + rho * g_l @ g_l.T @ g_v, atol=1e-11)
    np.testing.assert_allclose(by_g_l, -g_v @ covariance + rho * g_v @ g_v.T @ g_l, atol=1e-11)
    np.testing.assert_allclose(by_h_v, -c_l @ g_l.T @ g_v / (m - 1), atol=1e-11)
    np.testing.assert_allclose(by_h_l, -c_v @ g_v.T @ g_l / (m - 1), atol=1e-11)


def features_with_covariance(target: np.ndarray, m: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (m, p), (m, q), means not zero, whose cross-covariance is exactly `target`."""
    rng = np.random.default_rng(seed)
    centred = rng.normal(size=(m, target.shape[0]))
    centred -= centred.mean(axis=0)
    white = np.linalg.qr(centred)[0] * math.sqrt(m - 1)  # covariance: the identity
    return tensor(white + 0.3), tensor(white @ target - 0.2)


@pytest.mark.parametrize("rho", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("d", [5, 8])
def test_gradient_descent_on_the_linear_loss_reaches_the_closed_form(d: int, rho: float) -> None:
    rng = np.random.default_rng(7)
    left = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    right = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    target = left[:, :5] @ np.diag([1.0, 0.9, 0.8, 0.7, 0.6]) @ right  # full rank
    h_image, h_text = features_with_covariance(target, 40, seed=8)
    g_image = tensor(0.1 * rng.normal(size=(d, 6)), grad=True)
    g_text = tensor(0.1 * rng.normal(size=(d, 5)), grad=True)
    for _ in range(400):
        loss = losses.linear_contrastive(h_image, h_text, g_image, g_text, rho)
        by_image, by_text = torch.autograd.grad(loss, (g_image, g_text))
        with torch.no_grad():
            g_image -= 0.3 * by_image
            g_text -= 0.3 * by_text
    product = (g_image.T @ g_text).detach().numpy()
    np.testing.assert_allclose(product, target / rho, atol=1e-8)
    # and the value there is -‖C‖² / (2 rho)
    assert loss.item() == pytest.approx(-(target**2).sum() / (2 * rho), rel=1e-9)


# ---- CovMatch ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rho", "lambda_"), [(1.0, 0.0), (2.0, 0.1), (0.5, 3.0)])
def test_covmatch_value_and_gradient(rho: float, lambda_: float) -> None:
    rng = np.random.default_rng(11)
    t_v, t_l = rng.normal(1, 1, size=(9, 4)), rng.normal(size=(9, 4))
    s_v, s_l = rng.normal(size=(5, 4)), rng.normal(0, 2, size=(5, 4))
    real = [tensor(t_v, grad=True), tensor(t_l, grad=True)]
    syn = [tensor(s_v, grad=True), tensor(s_l, grad=True)]
    loss = losses.covmatch(*real, *syn, rho, lambda_)

    difference = rho * np.cov(t_v.T, t_l.T)[:4, 4:] - np.cov(s_v.T, s_l.T)[:4, 4:]
    gap_v, gap_l = t_v.mean(axis=0) - s_v.mean(axis=0), t_l.mean(axis=0) - s_l.mean(axis=0)
    expected = sum(x**2 for x in difference.ravel())
    expected += lambda_ * sum(x**2 for x in (*gap_v, *gap_l))
    assert loss.item() == pytest.approx(expected, rel=1e-12)

    by_t_v, by_t_l, by_s_v, by_s_l = grad_of(loss, *real, *syn)
    for sign, n, a, b, by_a, by_b in (
        (2 * rho, 9, t_v, t_l, by_t_v, by_t_l),
        (-2.0, 5, s_v, s_l, by_s_v, by_s_l),
    ):
        a_c, b_c = a - a.mean(axis=0), b - b.mean(axis=0)
        side = 1 if sign > 0 else -1
        mean_v, mean_l = 2 * side * lambda_ * gap_v / n, 2 * side * lambda_ * gap_l / n
        np.testing.assert_allclose(by_a, sign / (n - 1) * b_c @ difference.T + mean_v, atol=1e-11)
        np.testing.assert_allclose(by_b, sign / (n - 1) * a_c @ difference + mean_l, atol=1e-11)


def test_covmatch_of_equal_sets_is_zero_at_rho_one_and_known_elsewhere() -> None:
    rng = np.random.default_rng(12)
    image, text = tensor(rng.normal(size=(8, 3))), tensor(rng.normal(size=(8, 3)))
    order = torch.tensor(rng.permutation(8))
    same = losses.covmatch(image, text, image[order], text[order], rho=1.0, lambda_=0.7)
    assert same.item() == pytest.approx(0, abs=1e-25)
    norm = losses.cross_covariance(image, text).square().sum().item()
    for rho in (0.0, 2.0, 3.0):
        value = losses.covmatch(image, text, image, text, rho, lambda_=0.7).item()
        assert value == pytest.approx((rho - 1) ** 2 * norm, rel=1e-10)


def test_covmatch_pairs_up_images_and_texts() -> None:
    # Same images, same texts, wrong pairing: the means agree, the covariance must not.
    rng = np.random.default_rng(13)
    image, text = tensor(rng.normal(size=(8, 3))), tensor(rng.normal(size=(8, 3)))
    covariance, means = losses.covmatch_terms(image, text, image, text.roll(1, dims=0), rho=1.0)
    assert means.item() == pytest.approx(0, abs=1e-25)
    assert covariance.item() > 0.1


def test_covmatch_terms_sum_to_covmatch() -> None:
    rng = np.random.default_rng(14)
    sets = [tensor(rng.normal(size=(n, 3))) for n in (6, 6, 4, 4)]
    covariance, means = losses.covmatch_terms(*sets, rho=1.5)
    total = losses.covmatch(*sets, rho=1.5, lambda_=0.3).item()
    assert total == pytest.approx(covariance.item() + 0.3 * means.item(), rel=1e-14)


# ---- MDM: agreement, discrepancy, geodesic kernel energy ---------------------------------------


def test_agreement_and_discrepancy() -> None:
    rng = np.random.default_rng(20)
    u, v = unit(rng, 6, 5), unit(rng, 6, 5)
    plus = losses.agreement(tensor(u), tensor(v)).numpy()
    minus = losses.discrepancy(tensor(u), tensor(v)).numpy()
    for i in range(6):
        np.testing.assert_allclose(plus[i], (u[i] + v[i]) / math.sqrt(sum((u[i] + v[i]) ** 2)))
        np.testing.assert_allclose(minus[i], (u[i] - v[i]) / math.sqrt(sum((u[i] - v[i]) ** 2)))
    # The sum and the difference of two unit vectors are at right angles.
    np.testing.assert_allclose((plus * minus).sum(axis=1), 0, atol=1e-12)


def gke(a: np.ndarray, b: np.ndarray, sigma: float) -> float:
    def mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
        total = 0.0
        for p in x:
            for q in y:
                # the angle from its chord: accurate at 0 and at π, where arccos is not
                angle = 2 * math.atan2(float(np.linalg.norm(p - q)), float(np.linalg.norm(p + q)))
                total += math.exp(-(angle**2) / (2 * sigma**2))
        return total / (len(x) * len(y))

    squared = mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)
    return math.sqrt(max(squared, 0.0))


@pytest.mark.parametrize("sigma", [0.2, 0.5, 2.0])
@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 2), (5, 3, 4), (4, 7, 16)])
def test_geodesic_kernel_energy_value(m: int, n: int, d: int, sigma: float) -> None:
    rng = np.random.default_rng([m, n, d])
    a, b = unit(rng, m, d), unit(rng, n, d)
    expected = gke(a, b, sigma)
    assert losses.geodesic_kernel_energy(tensor(a), tensor(b), sigma).item() == pytest.approx(
        expected, rel=1e-6
    )
    assert losses.geodesic_kernel_energy(tensor(b), tensor(a), sigma).item() == pytest.approx(
        expected, rel=1e-6
    )


@given(m=st.integers(1, 8), n=st.integers(1, 8), d=st.integers(2, 12), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_geodesic_kernel_energy_is_a_distance_of_sets(m: int, n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = unit(rng, m, d), unit(rng, n, d)
    for dtype, noise in ((torch.float64, 1e-7), (torch.float32, 3e-3)):
        x, y = tensor(a, dtype=dtype), tensor(b, dtype=dtype)
        value = losses.geodesic_kernel_energy(x, y).item()
        assert value >= 0
        assert losses.geodesic_kernel_energy(y, x).item() == pytest.approx(value, abs=noise)
        assert losses.geodesic_kernel_energy(x, x).item() == 0
        shuffled = x[torch.tensor(rng.permutation(m))]
        assert losses.geodesic_kernel_energy(x, shuffled).item() == pytest.approx(0, abs=noise)
        twice = torch.cat([x, x])  # the same distribution, drawn twice as often
        assert losses.geodesic_kernel_energy(x, twice).item() == pytest.approx(0, abs=noise)


def test_geodesic_kernel_energy_gradient_on_the_sphere() -> None:
    rng = np.random.default_rng(22)
    raw_a, raw_b = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
    a, b = tensor(raw_a, grad=True), tensor(raw_b, grad=True)

    by_a, by_b = grad_of(energy_on_the_sphere(a, b), a, b)

    def reference(x: np.ndarray, y: np.ndarray) -> float:
        x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
        return gke(x, y, 0.5)

    for raw, gradient, first in ((raw_a, by_a, True), (raw_b, by_b, False)):
        for index in np.ndindex(raw.shape):
            up, down = raw.copy(), raw.copy()
            up[index] += 1e-5
            down[index] -= 1e-5
            pair = (up, raw_b, down, raw_b) if first else (raw_a, up, raw_a, down)
            slope = (reference(*pair[:2]) - reference(*pair[2:])) / 2e-5
            assert gradient[index] == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [2, 16, 768])
def test_geodesic_kernel_energy_gradient_is_finite_at_coinciding_and_opposite_points(
    d: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(d)
    z = unit(rng, 6, d)
    nearly = z + 1e-8 * rng.normal(size=z.shape)
    for a, b in (
        (z, z),  # a synthetic set that starts from the real pairs
        (z, z[::-1].copy()),
        (z, -z),
        (z, nearly),
        (np.repeat(z[:1], 6, axis=0), z),  # a collapsed model
        (np.repeat(z[:1], 6, axis=0), -np.repeat(z[:1], 4, axis=0)),
    ):
        x, y = tensor(a, grad=True, dtype=dtype), tensor(b, grad=True, dtype=dtype)
        value = losses.geodesic_kernel_energy(x, y)
        assert torch.isfinite(value)
        assert value.item() == pytest.approx(gke(a, b, 0.5), abs=5e-3)
        for gradient in torch.autograd.grad(value, (x, y)):
            assert torch.isfinite(gradient).all()


# ---- MDM: the kernels of its ablation --------------------------------------------------------


def energy_by_pairs(a: np.ndarray, b: np.ndarray, sigma: float, kernel: str) -> float:
    """The V-statistic with one loop per pair of points, from chords and angles."""

    def k(p: np.ndarray, q: np.ndarray) -> float:
        chord = math.sqrt(sum((p - q) ** 2))
        angle = 2 * math.atan2(chord, math.sqrt(sum((p + q) ** 2)))
        if kernel == "laplacian":
            return math.exp(-chord / sigma)
        return math.exp(-((angle if kernel == "geodesic" else chord) ** 2) / (2 * sigma**2))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return math.fsum(k(p, q) for p in x for q in y) / (len(x) * len(y))

    return math.sqrt(max(mean(a, a) + mean(b, b) - 2 * mean(a, b), 0.0))


KERNELS: tuple[losses.KernelName, ...] = ("geodesic", "chordal", "laplacian")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sigma", [0.2, 0.5, 2.0])
@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 2), (5, 3, 4), (4, 7, 16)])
def test_kernel_energy_is_a_distance_of_sets(
    m: int, n: int, d: int, sigma: float, kernel: losses.KernelName
) -> None:
    rng = np.random.default_rng([m, n, d, 1])
    a, b = unit(rng, m, d), unit(rng, n, d)
    x, y = tensor(a), tensor(b)
    value = losses.kernel_energy(x, y, sigma, kernel).item()
    assert value == pytest.approx(energy_by_pairs(a, b, sigma, kernel), rel=1e-6)
    assert value > 0
    assert losses.kernel_energy(y, x, sigma, kernel).item() == pytest.approx(value, rel=1e-9)
    for dtype, noise in ((torch.float64, 1e-6), (torch.float32, 3e-3)):
        z = x.to(dtype)
        shuffled = z[torch.tensor(rng.permutation(m))]
        assert losses.kernel_energy(z, z, sigma, kernel).item() == 0
        assert losses.kernel_energy(z, shuffled, sigma, kernel).item() <= noise
    # No rotation changes it: only inner products count.
    turn, _ = np.linalg.qr(rng.normal(size=(d, d)))
    turned = losses.kernel_energy(tensor(a @ turn), tensor(b @ turn), sigma, kernel)
    assert turned.item() == pytest.approx(value, rel=1e-6)


def test_kernels_by_angle() -> None:
    """Between two points the energy is √(2 - 2k), so that k can be read off."""
    for angle in (0.3, 1.0, math.pi / 2, 3.0, math.pi):
        x = tensor(np.array([[1.0, 0.0]]))
        y = tensor(np.array([[math.cos(angle), math.sin(angle)]]))
        chord = 2 * math.sin(angle / 2)
        expected = {
            "geodesic": math.exp(-(angle**2) / 0.5),
            "chordal": math.exp(-(chord**2) / 0.5),
            "laplacian": math.exp(-chord / 0.5),
        }
        for kernel in KERNELS:
            energy = losses.kernel_energy(x, y, 0.5, kernel).item()
            assert 1 - energy**2 / 2 == pytest.approx(expected[kernel], abs=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_energy_gradient_is_finite_everywhere(
    dtype: torch.dtype, kernel: losses.KernelName
) -> None:
    rng = np.random.default_rng(7)
    z = unit(rng, 6, 16)
    same = np.repeat(z[:1], 6, axis=0)
    nearly = z + 1e-8 * rng.normal(size=z.shape)
    for a, b in ((z, z), (z, z[::-1].copy()), (z, -z), (z, nearly), (same, z), (same, -same)):
        x, y = tensor(a, grad=True, dtype=dtype), tensor(b, grad=True, dtype=dtype)
        value = losses.kernel_energy(x, y, 0.5, kernel)
        assert value.item() == pytest.approx(energy_by_pairs(a, b, 0.5, kernel), abs=5e-3)
        for gradient in torch.autograd.grad(value, (x, y)):
            assert torch.isfinite(gradient).all()


# ---- MTT ---------------------------------------------------------------------------------------


def test_trajectory_distance_value_and_gradient() -> None:
    rng = np.random.default_rng(30)
    student, target, start = rng.normal(size=(3, 11))
    x = tensor(student, grad=True)
    loss = losses.trajectory_distance(x, tensor(target), tensor(start))
    moved = sum((s - t) ** 2 for s, t in zip(start, target, strict=True))
    left = sum((s - t) ** 2 for s, t in zip(student, target, strict=True))
    assert loss.item() == pytest.approx(left / moved, rel=1e-12)
    (gradient,) = grad_of(loss, x)
    np.testing.assert_allclose(gradient, 2 * (student - target) / moved, rtol=1e-12)


def test_trajectory_distance_is_one_at_the_start_and_zero_at_the_target() -> None:
    start, target = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    assert losses.trajectory_distance(start, target, start).item() == pytest.approx(1)
    assert losses.trajectory_distance(target, target, start).item() == 0


# ---- all of them -------------------------------------------------------------------------------

EYE = torch.eye(4)


def energy_on_the_sphere(x: Tensor, y: Tensor) -> Tensor:
    # Through the normalisation, as in training: along the radius the clamped diagonal differs.
    return losses.geodesic_kernel_energy(
        torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1)
    )


def energy_with(kernel: losses.KernelName) -> Callable[[Tensor, Tensor], Tensor]:
    def energy(x: Tensor, y: Tensor) -> Tensor:
        x, y = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
        return losses.kernel_energy(x, y, 0.7, kernel)

    return energy


DIFFERENTIABLE: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "info_nce": (lambda a, b: losses.info_nce(a, b, 0.5), [(4, 3)] * 2),
    "extended_info_nce": (losses.extended_info_nce, [(4, 4)] * 2),
    "binary_cross_entropy": (losses.binary_cross_entropy, [(4, 4)] * 2),
    "weighted_binary_cross_entropy": (losses.weighted_binary_cross_entropy, [(4, 4)] * 2),
    "linear_contrastive": (
        lambda a, b, p, q: losses.linear_contrastive(a, b, p, q, 1.5),
        [(5, 3), (5, 4), (2, 3), (2, 4)],
    ),
    "covmatch": (
        lambda a, b, p, q: losses.covmatch(a, b, p, q, 2.0, 0.3),
        [(5, 3), (5, 3), (4, 3), (4, 3)],
    ),
    "agreement": (lambda a, b: losses.agreement(a, b).square().cumsum(0).sum(), [(4, 3)] * 2),
    "discrepancy": (lambda a, b: losses.discrepancy(a, b)[:, 0].sum(), [(4, 3)] * 2),
    "geodesic_kernel_energy": (energy_on_the_sphere, [(5, 8), (7, 8)]),
    "chordal kernel_energy": (energy_with("chordal"), [(5, 8), (7, 8)]),
    "laplacian kernel_energy": (energy_with("laplacian"), [(5, 8), (7, 8)]),
    "trajectory_distance": (losses.trajectory_distance, [(6,)] * 3),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    function, shapes = DIFFERENTIABLE[name]
    generator = torch.Generator().manual_seed(len(name))
    inputs = tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    )
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_float32_follows_float64(name: str) -> None:
    function, shapes = DIFFERENTIABLE[name]
    generator = torch.Generator().manual_seed(99)
    single = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    exact = [x.detach().double().requires_grad_() for x in single]
    value, reference = function(*single), function(*exact)
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert value.item() == pytest.approx(reference.item(), rel=1e-4, abs=1e-5)
    pairs = zip(
        torch.autograd.grad(value, single), torch.autograd.grad(reference, exact), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.info_nce(torch.zeros(3, 2), torch.zeros(4, 2)), "info_nce"),
        (lambda: losses.info_nce(torch.zeros(3, 2), torch.zeros(3, 5)), "info_nce"),
        (lambda: losses.info_nce(torch.zeros(0, 2), torch.zeros(0, 2)), "info_nce"),
        (lambda: losses.info_nce(torch.zeros(2), torch.zeros(2)), "info_nce"),
        (lambda: losses.extended_info_nce(torch.zeros(3, 4), torch.zeros(3, 4)), "extended"),
        (lambda: losses.extended_info_nce(EYE, torch.eye(3)), "extended"),
        (lambda: losses.binary_cross_entropy(EYE, torch.eye(3)), "binary_cross_entropy"),
        (lambda: losses.binary_cross_entropy(EYE[:0], EYE[:0]), "binary_cross_entropy"),
        (lambda: losses.weighted_binary_cross_entropy(EYE, torch.ones(4)), "weighted_binary"),
        (lambda: losses.cross_covariance(EYE[:1], EYE[:1]), "at least two"),
        (lambda: losses.cross_covariance(EYE[:2], EYE), "same number of rows"),
        (lambda: losses.linear_contrastive(EYE[:1], EYE[:1], EYE, EYE, 1.0), "at least two"),
        (lambda: losses.linear_contrastive(EYE[:3], EYE, EYE, EYE, 1.0), "equally many"),
        (lambda: losses.covmatch(EYE, EYE, EYE[:1], EYE[:1], 1.0, 0.1), "at least two"),
        (lambda: losses.kernel_energy(EYE, EYE, 0.5, "cosine"), "unknown kernel 'cosine'"),  # type: ignore[arg-type]
        (lambda: losses.kernel_energy(EYE, EYE[:, :3]), "of one width"),
        (lambda: losses.kernel_energy(EYE, EYE[:0]), "at least one"),
        (lambda: losses.kernel_energy(EYE[0], EYE), "two sets of vectors"),
        (lambda: losses.trajectory_distance(EYE[0], EYE[1], EYE[1]), "did not move"),
    ],
)
def test_impossible_inputs_are_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
