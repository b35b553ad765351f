"""Trajectory matching: gradients against independent recomputations in float64, and the loop."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from mmdd import losses
from mmdd.batches import RealBatches
from mmdd.data.pairs import PairDataset
from mmdd.distill import METHODS, Context, distill, iterate
from mmdd.distill.decoupled import DecoupledConfig
from mmdd.distill.moment_trajectory import MomentTrajectory
from mmdd.distill.moments import JointMoments
from mmdd.distill.repblend import RepBlend, RepBlendConfig
from mmdd.distill.trajectory import TrajectoryMatching
from mmdd.errors import ConfigError
from mmdd.experts import ExpertBuffer
from mmdd.protocols import PROTOCOLS, Protocol, trained_parameters
from mmdd.similarity import FullSimilarity, LowRankSimilarity
from mmdd.snapshots import SnapshotCache
from mmdd.synthetic import SyntheticPairs

MakeContext = Callable[..., Context]
Make = Callable[..., TrajectoryMatching]
EXPERTS = {"count": 2, "epochs": 3, "batch_size": 10, "lr_image": 0.02, "lr_text": 0.02}
SETTINGS: dict[str, Any] = {
    "iterations": 4,
    "syn_steps": 3,
    "synthetic_batch": 4,
    "max_start_epoch": 1,
    "student_lr_image": 0.03,
    "student_lr_text": 0.02,
    "student_lr_heads": 0.2,
    "experts": EXPERTS,
}
SMALL_STEPS: dict[str, Any] = {
    "optimizer": "adam",
    "lr_image": 0.05,
    "lr_text": 0.05,
    "lr_similarity": 0.01,
}
STEPWISE = ("double-backward", "forward-over-reverse")


@pytest.fixture(scope="module")
def buffers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture
def make(make_context: MakeContext, buffers: Path) -> Make:
    """make(method, protocol=…, model=…, **settings): a distiller with trained experts."""

    def build(
        method: str = "mtt",
        protocol: Protocol = "image+text_head",
        model: str = "scenes-tiny",
        seed: int = 0,
        **changes: Any,
    ) -> TrajectoryMatching:
        entry = METHODS[method]
        settings = entry.config(**{**SETTINGS, **changes})
        context = make_context(protocol, model=model, seed=seed)
        context = replace(context, model_config={"pair": model})
        prepared, _ = entry.distiller.prepare(settings, context, buffers, progress=False)
        made = entry.distiller(settings, replace(context, prepared=prepared))
        assert isinstance(made, TrajectoryMatching)
        return made

    return build


class DoubleBuffer(ExpertBuffer):
    """The same experts in float64."""

    def __init__(self, buffer: ExpertBuffer) -> None:
        self.__dict__.update(buffer.__dict__)

    def read(self, expert: int, snapshot: int) -> Tensor:
        return super().read(expert, snapshot).double()


def in_double(method: TrajectoryMatching) -> TrajectoryMatching:
    """Everything that the gradient depends on, in float64."""
    method.model.double()
    method.set.double()
    method.similarity.double()
    method.raw_rates.data = method.raw_rates.data.double()
    method.experts = DoubleBuffer(method.experts)
    method.model.eval()  # dropout masks differ between types
    return method


def gradients(method: TrajectoryMatching, iteration: int = 0) -> dict[str, Tensor]:
    method.optimizer.zero_grad(set_to_none=True)
    method.backward(iteration)
    return {
        name: torch.zeros_like(t) if t.grad is None else t.grad.clone()
        for name, t in method.learnables().items()
    }


def soften(method: TrajectoryMatching) -> None:
    """Away from the identity, where half of the similarity's gradients are zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in method.similarity.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


# -- an independent student ------------------------------------------------------------------------


def loss_of(name: str, z_image: Tensor, z_text: Tensor, similarity: Tensor) -> Tensor:
    """The four losses from probabilities, as the papers write them (directions averaged)."""
    logits = z_image @ z_text.T / 0.07
    m = len(logits)
    if name in ("info_nce", "ence"):
        target = torch.eye(m).to(logits) if name == "info_nce" else similarity
        rows, columns = logits.softmax(dim=1).log(), logits.softmax(dim=0).log()
        return -(target * (rows + columns)).sum() / (2 * m)
    p = torch.sigmoid(logits)
    terms = -similarity * p.log() - (1 - similarity) * (1 - p).log()
    if name == "bce":
        return terms.mean()
    positive = similarity > 0.5
    return 0.5 * (terms[positive].mean() + terms[~positive].mean())


def endpoints(
    method: TrajectoryMatching, iteration: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Where the student starts and should arrive, by name of the parameter."""
    config = method.config
    names = list(method.layout.names)
    shapes = dict(zip(names, method.layout.shapes, strict=True))

    def read(expert: int, snapshot: int) -> dict[str, Tensor]:
        pieces = method.experts.read(expert, snapshot).split([shapes[n].numel() for n in names])
        return {n: p.view(shapes[n]) for n, p in zip(names, pieces, strict=True)}

    if isinstance(config, DecoupledConfig):
        rng = method.rng(4, iteration)
        expert = int(rng.integers(2))
        image = int(rng.integers(config.min_start_epoch, config.max_start_epoch + 1))
        text = int(rng.integers(config.min_start_text, config.max_start_text + 1))
    else:
        rng = method.rng(1, iteration)
        expert = int(rng.integers(2))
        image = text = int(rng.integers(config.max_start_epoch + 1))
    found = []
    for later in (0, config.expert_epochs):
        seen = {"image": read(expert, image + later), "text": read(expert, text + later)}
        found.append({name: seen[name.split("_")[0]][name] for name in names})
    return found[0], found[1]


def embed(
    method: TrajectoryMatching, theta: dict[str, Tensor], images: Tensor, texts: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Projected and normalised features of a student step. rest: the mask, the step's key."""
    mask, key = rest
    if not isinstance(method.config, RepBlendConfig):
        z_image, z_text = torch.func.functional_call(method.model, theta, (images, texts, mask))
        return z_image, z_text
    rng = np.random.default_rng([*key, 3])
    partner = rng.permutation(len(images))
    beta = method.config.blend_beta
    rho = method.config.blend if beta is None else rng.beta(beta, beta)
    projected = []
    for side, h in (
        ("image", method.model.image_encoder(images)),
        ("text", texts),  # vectors
    ):
        rows = [(1 - rho) * h[m] + rho * h[i] for m, i in enumerate(partner)]
        projected.append(F.normalize(torch.stack(rows) @ theta[f"{side}_head.weight"].T, dim=1))
    return projected[0], projected[1]


def reference(method: TrajectoryMatching, iteration: int, detached: bool) -> dict[str, Tensor]:
    """Gradients of the matching loss by unrolling copies of the model with plain autograd."""
    config = method.config
    names = list(method.layout.names)
    start, target = endpoints(method, iteration)
    parts = list(method.layout.sizes)
    rates = dict(zip(parts, method.rates(), strict=True))
    theta = {n: t.clone().requires_grad_() for n, t in start.items()}
    moved = {n: torch.zeros_like(t) for n, t in start.items()}  # Σ η g
    for step_number, rows in enumerate(method.batches(iteration)):
        images = method.set.images[rows] * method.set.std + method.set.mean
        texts, mask = method.set.text(rows)
        here = {n: t.detach().requires_grad_() for n, t in theta.items()} if detached else theta
        key = [method.seed, iteration, step_number]
        z_image, z_text = embed(method, here, images, texts, mask, key)
        similarity = method.similarity.matrix()[rows][:, rows]
        loss = loss_of(config.loss, z_image, z_text, similarity)
        found = torch.autograd.grad(loss, list(here.values()), create_graph=True)
        for (name, value), gradient in zip(here.items(), found, strict=True):
            step = rates[name.split(".")[0]] * gradient
            moved[name] = moved[name] + step
            theta[name] = value - step
    groups = {n: n.split(".")[0] for n in names}
    if config.distance == "branch":
        groups = {n: part.split("_")[0] for n, part in groups.items()}
    outer = torch.zeros((), dtype=torch.float64)
    for group in dict.fromkeys(groups.values()):
        members = [n for n in names if groups[n] == group]
        apart = sum(((start[n] - moved[n] - target[n]) ** 2).sum() for n in members)
        outer = outer + apart / sum(((start[n] - target[n]) ** 2).sum() for n in members)
    learned = method.learnables()
    values = torch.autograd.grad(
        outer, list(learned.values()), materialize_grads=True, allow_unused=True
    )
    return dict(zip(learned, values, strict=True))


def assert_parallel(found: dict[str, Tensor], wanted: dict[str, Tensor], rel: float) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert value.norm() > 0, name
        assert float((found[name] - value).norm() / value.norm()) < rel, name


CASES = [
    ("mtt", "image+text_head", "scenes-tiny", {}),
    ("mtt", "both", "scenes-tiny", {}),
    ("mtt", "both", "resnet-bert", {"student_lr_image": 0.003}),
    ("mtt", "heads", "scenes-tiny", {}),
    ("mtt", "image+text_head", "scenes-tiny", {"distance": "part", "log_rates": True}),
    ("lors", "image+text_head", "scenes-tiny", {"rank": 2}),
    ("lors", "image+text_head", "scenes-tiny", {"similarity": "full", "loss": "ence"}),
    ("lors", "both", "scenes-tiny", {"similarity": "full", "loss": "bce"}),
    ("repblend", "heads", "scenes-tiny", {"blend_beta": None, "blend": 0.3, "loss": "ence"}),
    ("repblend", "image+text_head", "scenes-tiny", {"blend_beta": 1.0}),
    ("repblend", "heads", "resnet-bert", {"blend_beta": None, "blend": 0.0}),
    ("amd", "image+text_head", "scenes-tiny", {"min_start_text": 2}),
    ("amd", "both", "scenes-tiny", {"min_start_epoch": 1, "max_start_text": 0}),
]
IDS = [f"{m}-{p}-{model}-{'-'.join(map(str, c.values()))}" for m, p, model, c in CASES]


@pytest.mark.parametrize(("method", "protocol", "model", "changes"), CASES, ids=IDS)
def test_the_full_gradient(
    make: Make, method: str, protocol: Protocol, model: str, changes: dict[str, Any]
) -> None:
    """One graph, and step by step with either exact engine: all equal the reference."""
    settings = {"gradient": "full", "engine": "unroll"} | changes
    first = in_double(make(method, protocol, model, **settings))
    soften(first)
    wanted = reference(first, 1, detached=False)
    assert_parallel(gradients(first, 1), wanted, 1e-9)
    for engine in STEPWISE:
        other = in_double(make(method, protocol, model, **{**settings, "engine": engine}))
        soften(other)
        assert_parallel(gradients(other, 1), wanted, 1e-9)


@pytest.mark.parametrize(("method", "protocol", "model", "changes"), CASES, ids=IDS)
def test_teslas_gradient(
    make: Make, method: str, protocol: Protocol, model: str, changes: dict[str, Any]
) -> None:
    """Two passes equal the gradient of the unrolled student whose parameters are detached."""
    settings = {"gradient": "detached", "engine": "double-backward"} | changes
    first = in_double(make(method, protocol, model, **settings))
    soften(first)
    wanted = reference(first, 1, detached=True)
    assert_parallel(gradients(first, 1), wanted, 1e-9)
    over = in_double(
        make(method, protocol, model, **{**settings, "engine": "forward-over-reverse"})
    )
    soften(over)
    assert_parallel(gradients(over, 1), wanted, 1e-9)


def test_the_two_gradients_differ(make: Make) -> None:
    """Or the tests above could not tell them apart."""
    full = gradients(in_double(make("mtt", syn_steps=4)))
    detached = gradients(in_double(make("tesla", syn_steps=4)))
    for name in ("images", "texts"):
        apart = (full[name] - detached[name]).norm() / full[name].norm()
        assert apart > 1e-3


def test_with_one_step_they_agree(make: Make) -> None:
    full = gradients(in_double(make("mtt", syn_steps=1)))
    detached = gradients(in_double(make("tesla", syn_steps=1)))
    assert_parallel(detached, full, 1e-10)


def test_the_image_gradient_against_a_difference_quotient(make: Make) -> None:
    """Nothing but values of the matching loss."""
    method = in_double(make("mtt", engine="forward-over-reverse"))
    found = gradients(method)["images"]
    way = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        values = []
        for shift in (1e-5, -2e-5):
            method.set.images += shift * way
            with torch.enable_grad():
                values.append(method.backward(0)["loss"].item())
    expected = (values[0] - values[1]) / 2e-5
    assert float((found * way).sum()) == pytest.approx(expected, rel=1e-5)


def test_finite_differences_report_their_error(make: Make) -> None:
    exact = gradients(make("lors", loss="ence"))
    method = make("lors", loss="ence", engine="finite-difference", error_every=2)
    found = gradients(method)
    reported = method.backward(0)["relative_error"]
    assert 1e-7 < reported < 1e-2
    apart = (found["images"] - exact["images"]).norm() / exact["images"].norm()
    assert float(apart) < 20 * reported
    method.after_step(0)
    assert method.backward(1)["relative_error"] == reported  # of the last measurement
    assert method.backward(2)["relative_error"] != reported


# -- LoRS ------------------------------------------------------------------------------------------


def test_lors_starts_as_tesla(make: Make) -> None:
    """S̃ = I: with eNCE the first iteration is TESLA's with InfoNCE, to the bit."""
    plain, soft = make("tesla"), make("lors", loss="ence")
    a, b = gradients(plain), gradients(soft)
    for name in ("images", "texts", "rates"):
        assert torch.equal(a[name], b[name]), name
    assert b["similarity.omega"].abs().max() > 0
    assert b["similarity.right"].abs().max() > 0
    assert b["similarity.left"].abs().max() == 0  # R is zero


def test_what_is_learned(make: Make) -> None:
    similarity = {"similarity.omega", "similarity.left", "similarity.right"}
    names: dict[tuple[str, ...], set[str]] = {
        (): {"images", "texts", "rates", *similarity},
        ("learn_residual",): {"images", "texts", "rates", "similarity.omega"},
        ("learn_residual", "learn_omega"): {"images", "texts", "rates"},
        ("learn_images",): {"texts", "rates", *similarity},
        ("learn_texts", "learn_rates"): {"images", *similarity},
    }
    for off, wanted in names.items():
        method = make("lors", **SMALL_STEPS, **dict.fromkeys(off, False))
        assert set(method.learnables()) == wanted
        before = {n: p.detach().clone() for n, p, _ in method.learned()}
        distill(method, 2, progress=False)
        changed = {n for n, p, _ in method.learned() if not torch.equal(p, before[n])}
        assert changed == wanted
    with pytest.raises(ConfigError, match="nothing to learn"):
        make("tesla", learn_images=False, learn_texts=False, learn_rates=False)


def test_a_copied_similarity_is_that_of_the_first_expert(make: Make) -> None:
    method = make("lors", similarity="copied")
    model = deepcopy(method.model).eval()
    own = trained_parameters(model, "image+text_head")
    flat, position = method.experts.read(0, 3), 0
    with torch.no_grad():
        for name in method.layout.names:
            size = own[name].numel()
            own[name].copy_(flat[position : position + size].view_as(own[name]))
            position += size
        start = method.context.start
        expected = model.embed_images(start.images) @ model.embed_texts(start.texts).T
    torch.testing.assert_close(method.similarity.matrix(), expected, rtol=1e-4, atol=1e-5)
    assert not any(name.startswith("similarity") for name in method.learnables())
    kept = method.export().similarity
    assert isinstance(kept, FullSimilarity)
    assert torch.equal(kept.matrix(), method.similarity.matrix())


def test_the_noise_of_a_low_rank_start_is_the_seeds(make: Make) -> None:
    first, again, other = (make("lors", seed=seed).similarity for seed in (0, 0, 1))
    assert isinstance(first, LowRankSimilarity)
    assert torch.equal(first.left, again.left)
    assert not torch.equal(first.left, other.left)
    assert torch.equal(first.matrix(), torch.eye(6))


def test_what_comes_out(make: Make, tmp_path: Path) -> None:
    method = make("lors", rank=2, optimizer="adam", lr_similarity=0.1)
    distilled, _ = distill(method, 3, progress=False)
    path = tmp_path / "set.safetensors"
    distilled.save(path)
    loaded = SyntheticPairs.load(path)
    assert isinstance(loaded.similarity, LowRankSimilarity)
    assert torch.equal(loaded.similarity.matrix(), method.similarity.matrix())
    assert loaded.learning_rates == pytest.approx(
        dict(
            zip(("image_encoder", "image_head", "text_head"), method.rates().tolist(), strict=True)
        )
    )
    assert loaded.metadata["method"] == "lors"
    before = loaded.similarity.matrix().clone()
    distill(method, 2, progress=False)
    assert torch.equal(distilled.similarity.matrix(), before)  # type: ignore[union-attr]


# -- batches, rates, checkpoints -------------------------------------------------------------------


def test_students_go_over_the_set_in_passes(make: Make) -> None:
    method = make(syn_steps=6, synthetic_batch=2)
    rows = method.batches(0)
    assert [len(r) for r in rows] == [2] * 6
    for half in (rows[:3], rows[3:]):
        assert sorted(torch.cat(half).tolist()) == list(range(6))
    assert [r.tolist() for r in rows] == [r.tolist() for r in method.batches(0)]
    assert [r.tolist() for r in rows] != [r.tolist() for r in method.batches(1)]
    # One pair left over has nothing to be told from: five pairs of the six per pass.
    assert [len(r) for r in make(syn_steps=3, synthetic_batch=5).batches(0)] == [5, 5, 5]


@pytest.mark.parametrize("log_rates", [False, True])
def test_rates_stay_positive(make: Make, log_rates: bool) -> None:
    method = make(optimizer="adam", lr_rates=0.5, log_rates=log_rates)
    assert method.rates().tolist() == pytest.approx([0.03, 0.2, 0.2])
    before = method.rates().tolist()
    distill(method, 3, progress=False)
    after = method.rates().tolist()
    assert min(after) > 0
    assert all(a != b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method", ["mtt", "tesla", "tesla-wbce", "lors", "repblend", "amd"])
def test_matching_gets_closer(make: Make, method: str, protocol: Protocol) -> None:
    changes = SMALL_STEPS | {"max_start_epoch": 0, "log_rates": True, "distance": "part"}
    if method == "amd":
        changes["max_start_text"] = 0
    if method == "repblend" and protocol == "both":
        with pytest.raises(ConfigError, match="under the protocol 'both' the texts are token"):
            make(method, protocol, **changes)
        return
    made = make(method, protocol, **changes)
    made.experts.manifests = made.experts.manifests[:1]  # one trajectory, one target
    _, progress = distill(made, 12, progress=False)
    assert progress.history["loss"][-1] < 0.97 * progress.history["loss"][0]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("mtt", {}),
        ("lors", {"engine": "finite-difference", "error_every": 3}),
        ("lors", {"loss": "ence", "engine": "forward-over-reverse", **SMALL_STEPS}),
        ("repblend", {"blend_beta": 0.5}),
        ("amd", {"min_start_text": 1, **SMALL_STEPS}),
        ("cov-trajectory", {"real_batch": 12, **SMALL_STEPS}),
        ("moment-trajectory", SMALL_STEPS),
    ],
)
def test_resume_in_the_middle(
    make: Make, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    whole, progress = distill(make(method, **changes), 7, progress=False)
    path = tmp_path / "checkpoint.safetensors"
    for iterations in (2, 5, 7):
        part, resumed = distill(
            make(method, **changes), iterations, checkpoint=path, progress=False
        )
    assert torch.equal(whole.images, part.images)
    assert torch.equal(whole.texts, part.texts)
    assert whole.learning_rates == part.learning_rates
    assert (whole.similarity is None) == (method in ("mtt", "cov-trajectory", "moment-trajectory"))
    if whole.similarity is not None:
        assert part.similarity is not None
        assert torch.equal(whole.similarity.matrix(), part.similarity.matrix())
    assert resumed.history == progress.history


def test_dropout_is_the_same_in_every_pass(make: Make) -> None:
    """The small BERT has dropout: with other masks in the second pass the two would differ."""
    found = [
        gradients(make("tesla", "both", "resnet-bert", engine=engine, student_lr_image=0.003))
        for engine in STEPWISE
    ]
    for name, value in found[0].items():
        torch.testing.assert_close(
            found[1][name], value, rtol=1e-3, atol=1e-4 * float(value.norm())
        )


# -- the newer peers -------------------------------------------------------------------------------


def test_without_blending_repblend_is_lors_on_the_heads(make: Make) -> None:
    plain = in_double(make("lors", "heads"))
    other = in_double(make("repblend", "heads", blend_beta=None, blend=0.0))
    blended = in_double(make("repblend", "heads", blend_beta=None, blend=0.3))
    for method in (plain, other, blended):
        soften(method)
    assert_parallel(gradients(other), gradients(plain), 1e-12)
    apart = gradients(blended)["images"] - gradients(plain)["images"]
    assert apart.norm() > 1e-3 * gradients(plain)["images"].norm()


def test_repblend_follows_the_projections_alone(make: Make) -> None:
    """Also where the students train their image encoder; then it has no rate to learn."""
    method = make("repblend", "image+text_head")
    assert list(method.layout.sizes) == ["image_head", "text_head"]
    assert set(method.export().learning_rates) == {"image_head", "text_head"}


def test_the_blend_of_a_step_is_the_steps_own(make: Make) -> None:
    method = make("repblend", "heads", blend_beta=0.5)
    assert isinstance(method, RepBlend)
    drawn = [method._partners(4, key) for key in ([0, 1, 0], [0, 1, 0], [0, 1, 1], [0, 2, 0])]
    assert drawn[0][0].tolist() == drawn[1][0].tolist()
    assert drawn[0][1] == drawn[1][1]
    assert len({rho for _, rho in drawn}) == 3
    assert all(0 <= rho <= 1 for _, rho in drawn)


def test_decoupled_branches_start_apart(make: Make) -> None:
    """Every combination in the ranges comes, and with equal ranges of one it is LoRS' own path."""
    method = make("amd", max_start_epoch=1, max_start_text=2)
    starts = [endpoints(method, i)[0] for i in range(60)]
    seen = {
        (float(s["image_head.weight"].sum()), float(s["text_head.weight"].sum())) for s in starts
    }
    assert len(seen) == 2 * 2 * 3
    for i in range(3):
        drawn = method._draw(i)
        for flat, named in zip(drawn, endpoints(method, i), strict=True):
            assert torch.equal(torch.cat(flat), method.layout.flatten(named))
    lors = make("lors", max_start_epoch=0)
    same = make("amd", max_start_epoch=0, max_start_text=0)
    lors.experts.manifests = lors.experts.manifests[:1]
    same.experts.manifests = same.experts.manifests[:1]
    for a, b in zip(lors._draw(0), same._draw(0), strict=True):
        assert torch.equal(torch.cat(a), torch.cat(b))


@pytest.mark.parametrize("snapshot", ["start", "target"])
def test_the_covariance_joins_the_trajectory(
    make: Make, scenes: PairDataset, snapshot: str
) -> None:
    alone = in_double(make("cov-trajectory", cov_weight=0.0))
    changes = {"rho": 1.5, "lambda_": 0.3, "real_batch": 12, "snapshot": snapshot}
    joined = in_double(make("cov-trajectory", cov_weight=0.7, **changes))
    protocol, device = joined.context.protocol, torch.device("cpu")
    batches = RealBatches(scenes, "train", joined.model, protocol, device)
    joined.context = replace(joined.context, real=batches)

    real = batches.draw(12, np.random.default_rng([joined.seed, 5, 0]))
    theta = endpoints(joined, 0)[snapshot == "target"]
    mean, std = joined.model.image_encoder.mean, joined.model.image_encoder.std
    images, texts = (
        t.detach().clone().requires_grad_() for t in (joined.set.images, joined.set.texts)
    )
    pixels = images * std.view(3, 1, 1) + mean.view(3, 1, 1)
    of_real = embed(joined, theta, real.images, real.texts, None, None)
    of_set = embed(joined, theta, pixels, texts, None, None)

    def covariance(a: Tensor, b: Tensor) -> Tensor:
        rows = zip(a - a.mean(dim=0), b - b.mean(dim=0), strict=True)
        return torch.stack([torch.outer(x, y) for x, y in rows]).sum(dim=0) / (len(a) - 1)

    loss = (1.5 * covariance(*of_real) - covariance(*of_set)).square().sum()
    for a, b in zip(of_real, of_set, strict=True):
        loss = loss + 0.3 * (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    loss.backward()
    base, found = gradients(alone), gradients(joined)
    for name, own in (("images", images.grad), ("texts", texts.grad)):
        assert own is not None
        wanted = base[name] + 0.7 * base[name].norm() / own.norm() * own
        assert torch.allclose(found[name], wanted, rtol=1e-8, atol=1e-12)
    assert torch.equal(found["rates"], base["rates"])  # no loss but the trajectory's knows them


def test_the_moments_join_the_trajectory(make: Make, scenes: PairDataset) -> None:
    """The moments' gradient from features of a model in its pretrained state, without dropout."""
    alone = in_double(make("moment-trajectory", moment_weight=0.0))
    joined = in_double(make("moment-trajectory", moment_weight=0.7))
    assert isinstance(joined, MomentTrajectory)
    model, protocol = joined.real.context.model.double(), joined.context.protocol
    assert not model.training
    batches = RealBatches(scenes, "train", model, protocol, torch.device("cpu"))
    joined.real = JointMoments(replace(joined.context, model=model, real=batches))
    (batch,) = batches.epoch(len(batches), joined.seed, 0)

    def features(images: Tensor, texts: Tensor, mask: Tensor | None) -> Tensor:
        sides = model.image_features(images), model.text_features(texts, mask)
        return torch.cat([h / h.norm(dim=1, keepdim=True) for h in sides], dim=1)

    images, texts = (
        t.detach().clone().requires_grad_() for t in (joined.set.images, joined.set.texts)
    )
    mean, std = (t.view(3, 1, 1) for t in (model.image_encoder.mean, model.image_encoder.std))
    real = features(batch.images.double(), batch.texts, batch.mask).detach()
    own = features(images * std + mean, texts, joined.set.mask)
    wanted = torch.cov(real.T)
    loss = (own.mean(dim=0) - real.mean(dim=0)).square().sum()
    loss = loss + (torch.cov(own.T) - wanted).square().sum() / wanted.square().sum()
    loss.backward()
    base, found = gradients(alone), gradients(joined)
    for name, second in (("images", images.grad), ("texts", texts.grad)):
        assert second is not None
        expected = base[name] + 0.7 * base[name].norm() / second.norm() * second
        assert torch.allclose(found[name], expected, rtol=1e-8, atol=1e-12)
    assert torch.equal(found["rates"], base["rates"])


@pytest.mark.parametrize(
    ("method", "weight"), [("cov-trajectory", "cov_weight"), ("moment-trajectory", "moment_weight")]
)
def test_without_a_second_loss_it_is_mtt(make: Make, method: str, weight: str) -> None:
    mtt, other = gradients(make("mtt")), gradients(make(method, **{weight: 0.0}))
    assert all(torch.equal(mtt[name], other[name]) for name in mtt)
    rates_only = make(method, learn_images=False, learn_texts=False)
    assert torch.equal(gradients(rates_only)["rates"], mtt["rates"])


# -- refusals --------------------------------------------------------------------------------------


def test_refusals(make: Make, make_context: MakeContext) -> None:
    with pytest.raises(ConfigError, match="have 3 snapshots"):
        make(max_start_epoch=3)
    with pytest.raises(ConfigError, match="engine 'unroll' has the full gradient"):
        make("tesla", engine="unroll")
    method = make()
    alone = replace(make_context("image+text_head", pairs=1), prepared=method.experts)
    with pytest.raises(ConfigError, match="at least two synthetic pairs, not 1"):
        TrajectoryMatching(method.config, alone)
    assert "student_lr" in method.hint()
    with pytest.raises(ConfigError, match=r"max_start_text \(3\) .* have 3 snapshots"):
        make("amd", max_start_text=3)
    with pytest.raises(ValidationError, match="from 2 to 1: none is left"):
        make("amd", min_start_text=2, max_start_text=1)


def test_independent_losses_are_the_projects(make: Make) -> None:
    """The reference above writes the losses out; here they meet the project's own."""
    from mmdd.losses import contrastive_loss

    generator = torch.Generator().manual_seed(0)
    z = [F.normalize(torch.randn(5, 4, generator=generator).double(), dim=1) for _ in range(2)]
    similarity = torch.eye(5).double() + 0.1 * torch.rand(5, 5, generator=generator).double()
    for name in ("info_nce", "ence", "bce", "wbce"):
        mine = contrastive_loss(name, z[0], z[1], 0.07, similarity)  # type: ignore[arg-type]
        assert mine.item() == pytest.approx(loss_of(name, z[0], z[1], similarity).item(), rel=1e-10)


def test_snapshots_come_from_where_they_are_kept(make: Make) -> None:
    plain, kept = make("lors"), make("lors")
    kept.snapshots = SnapshotCache(kept.experts, kept.device)  # as on a GPU
    for iteration in range(3):
        assert iterate(kept, iteration) == iterate(plain, iteration)
    assert 0 < kept.snapshots.reads <= 2 * 3
    assert plain.snapshots is None


@pytest.mark.parametrize("distance", ["branch", "part"])
def test_the_distance_is_that_of_the_losses(make: Make, distance: str) -> None:
    method = make("mtt", distance=distance)
    start, target = method._draw(0)
    student = [t + 0.01 * torch.randn_like(t) for t in target]
    parts = list(method.layout.sizes)
    groups = [[p] for p in parts] if distance == "part" else [["image"], ["text"]]
    wanted = []
    for (name,) in groups:
        rows = [i for i, part in enumerate(parts) if part.startswith(name)]
        wanted.append(
            losses.trajectory_distance(
                *(torch.cat([v[i] for i in rows]) for v in (student, target, start))
            )
        )
    assert torch.equal(method._distance(student, target, start), torch.stack(wanted).sum())
