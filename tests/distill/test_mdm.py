"""MDM against the algorithm written out again, in float64 and with plain loops."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmdd import expert_jobs
from mmdd.batches import RealBatches
from mmdd.config import RunConfig
from mmdd.data.pairs import PairDataset
from mmdd.distill import Context, Mdm, MdmConfig, distill
from mmdd.errors import ConfigError
from mmdd.experts import ExpertBuffer, buffer_folder
from mmdd.protocols import PROTOCOLS, Protocol, trained_parameters

MakeContext = Callable[..., Context]
Make = Callable[..., Mdm]
SETTINGS: dict[str, Any] = {
    "iterations": 4,
    "real_batch": 12,
    "lr_image": 0.5,
    "lr_text": 0.2,
    "experts": {"count": 3, "epochs": 2, "batch_size": 10, "lr_image": 0.02, "lr_text": 0.02},
}


@pytest.fixture(scope="module")
def buffers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture
def make(make_context: MakeContext, buffers: Path) -> Make:
    """make(protocol, model=…, pairs=…, seed=…, **settings): a distiller with trained experts."""

    def build(
        protocol: Protocol = "image+text_head",
        model: str = "scenes-tiny",
        pairs: int = 6,
        seed: int = 0,
        precision: Any = "float32",
        **changes: Any,
    ) -> Mdm:
        settings = MdmConfig(**{**SETTINGS, **changes})
        context = make_context(protocol, model=model, pairs=pairs, seed=seed)
        context = replace(context, model_config={"pair": model}, precision=precision)
        prepared, _ = Mdm.prepare(settings, context, buffers, progress=False)
        return Mdm(settings, replace(context, prepared=prepared))

    return build


class DoubleBuffer(ExpertBuffer):
    """The same experts in float64."""

    def __init__(self, buffer: ExpertBuffer) -> None:
        self.__dict__.update(buffer.__dict__)

    def read(self, expert: int, snapshot: int) -> Tensor:
        return super().read(expert, snapshot).double()


def in_double(method: Mdm, dataset: PairDataset) -> Mdm:
    """The same distiller with everything it computes with in float64."""
    context = method.context
    model = context.model.double()
    prepared = None if context.prepared is None else DoubleBuffer(context.prepared)
    real = RealBatches(dataset, "train", model, context.protocol, torch.device("cpu"))
    double = Mdm(method.config, replace(context, real=real, prepared=prepared))
    double.set.double()
    return double


# -- the algorithm, plainly ------------------------------------------------------------------------


def plain_energy(a: Tensor, b: Tensor, sigma: float, kernel: str) -> Tensor:
    """The square root of the V-statistic, one pair of points at a time."""

    def k(x: Tensor, y: Tensor) -> Tensor:
        if x is y:  # the diagonal: k = 1, whatever the slope there
            return torch.ones((), dtype=x.dtype)
        chord = (x - y).norm()
        if kernel == "geodesic":
            return torch.exp(-((2 * torch.asin(chord / 2)) ** 2) / (2 * sigma**2))
        if kernel == "chordal":
            return torch.exp(-(chord**2) / (2 * sigma**2))
        return torch.exp(-chord / sigma)

    def mean(x: list[Tensor], y: list[Tensor]) -> Tensor:
        return torch.stack([k(p, q) for p in x for q in y]).mean()

    x, y = list(a), list(b)
    return (mean(x, x) + mean(y, y) - 2 * mean(x, y)).sqrt()


def plain_info_nce(z_image: Tensor, z_text: Tensor, temperature: float) -> Tensor:
    logits = z_image @ z_text.T / temperature
    total = torch.zeros((), dtype=logits.dtype)
    for i in range(len(logits)):
        total = total + torch.logsumexp(logits[i], 0) - logits[i, i]
        total = total + torch.logsumexp(logits[:, i], 0) - logits[i, i]
    return total / (2 * len(logits))


def plain_unit(x: Tensor) -> Tensor:
    return x / x.pow(2).sum(dim=1, keepdim=True).sqrt()


def plain_model(method: Mdm, iteration: int) -> Any:
    """The model of an iteration, with the parameters put into a copy one by one."""
    config, buffer = method.config, method.context.prepared
    model = deepcopy(method.context.model).eval().requires_grad_(False)
    rng = np.random.default_rng([method.seed, 3, iteration])
    if config.model == "pretrained":
        model.reset_heads((method.seed + 1) * 1_000_003 + iteration)
        return model
    count = 1 if config.model == "fine-tuned" else 2
    drawn = rng.choice(len(buffer), size=count, replace=False)
    numbers = [int(rng.integers(1, buffer.snapshots + 1)) for _ in drawn]
    ends = [buffer.read(int(e), n) for e, n in zip(drawn, numbers, strict=True)]
    starts = [buffer.read(int(e), 0) for e in drawn]
    share = float(rng.random()) if config.model == "weighted-sum" else 0.0
    begin = 0
    own = dict(model.named_parameters())
    for name, shape in zip(method.layout.names, method.layout.shapes, strict=True):
        piece = slice(begin, begin + shape.numel())
        begin += shape.numel()
        if config.model == "fine-tuned":
            value = ends[0][piece]
        elif config.model == "weighted-sum":
            value = (1 - share) * ends[0][piece] + share * ends[1][piece]
        else:
            d1, d2 = (end[piece] - start[piece] for end, start in zip(ends, starts, strict=True))
            inner = float(d1 @ d2)
            t = max(0.0, 2 * inner / (float(d1.norm()) * float(d2.norm()) + inner))
            value = starts[0][piece] + config.alpha * t * (d1 + d2) / 2
        own[name].copy_(value.view(shape))
    return model


def plain_loss(
    method: Mdm, images: Tensor, texts: Tensor, iteration: int, dataset: PairDataset
) -> Tensor:
    config, seed = method.config, method.seed
    model = plain_model(method, iteration)
    rows, choice = dataset.draw(
        "train", config.real_batch, np.random.default_rng([seed, 1, iteration])
    )
    pixels = torch.tensor(dataset.images[rows].transpose(0, 3, 1, 2)).float().to(images.dtype) / 255
    captions = [dataset.captions[i][c] for i, c in zip(rows, choice, strict=True)]
    ids, mask = model.text_encoder.tokenize(captions)
    # Under a frozen text encoder these are the vectors of the pretrained one.
    reader = model if method.context.protocol == "both" else method.context.model
    features = reader.text_encoder.encode(reader.text_encoder.embed(ids), mask)
    real_image = plain_unit(model.image_head(model.image_encoder(pixels)))
    real_text = plain_unit(model.text_head(features.detach()))

    part = torch.arange(len(images))
    if config.synthetic_batch < len(images):
        order = np.random.default_rng([seed, 2, iteration]).permutation(len(images))
        part = torch.tensor(order[: config.synthetic_batch])
    mean, std = (getattr(model.image_encoder, n)[:, None, None] for n in ("mean", "std"))
    own = texts[part]
    if own.ndim == 3:
        own = model.text_encoder.encode(own, method.context.start.text_mask[part])
    z_image = plain_unit(model.image_head(model.image_encoder(images[part] * std + mean)))
    z_text = plain_unit(model.text_head(own))

    def energy(a: Tensor, b: Tensor) -> Tensor:
        return plain_energy(a, b, config.sigma, config.kernel)

    first, second = config.lambda_agreement, config.lambda_discrepancy
    loss = config.lambda_contrastive * plain_info_nce(z_image, z_text, config.temperature)
    if config.features == "agreement-discrepancy":
        u = plain_unit(real_image + real_text), plain_unit(z_image + z_text)
        g = plain_unit(real_image - real_text), plain_unit(z_image - z_text)
        return loss + first * energy(*u) + second * energy(*g)
    if config.features == "singles":
        return loss + first * energy(real_image, z_image) + second * energy(real_text, z_text)
    joint = torch.cat([real_image, real_text], 1), torch.cat([z_image, z_text], 1)
    return loss + (first + second) * energy(*(x / math.sqrt(2) for x in joint))


CASES: list[dict[str, Any]] = [
    {},
    {"protocol": "both"},
    {"protocol": "heads"},
    {"model": "resnet-bert"},
    {"model": "resnet-bert", "protocol": "both"},
    {"synthetic_batch": 4, "real_batch": 500},
    {"optimizer": "adam", "lr_image": 0.02, "lr_text": 0.01},
    {"momentum": 0.0, "alpha": 0.9, "sigma": 1.0, "temperature": 0.2},
    {"kernel": "chordal"},
    {"kernel": "laplacian"},
    {"features": "singles"},
    {"features": "concatenation"},
    {"way": "pretrained"},
    {"way": "fine-tuned"},
    {"way": "weighted-sum"},
    {"common_start": False},
    {"lambda_contrastive": 0.0},
    {"lambda_agreement": 0.0, "lambda_discrepancy": 0.3},
    {"lambda_agreement": 0.3, "lambda_discrepancy": 0.0, "features": "singles"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())) or "as")
def test_algorithm(make: Make, scenes: PairDataset, case: dict[str, Any]) -> None:
    method = in_double(build(make, case), scenes)
    images = method.set.images.detach().clone().requires_grad_()
    texts = method.set.texts.detach().clone().requires_grad_()
    groups = [
        {"params": [images], "lr": method.config.lr_image},
        {"params": [texts], "lr": method.config.lr_text},
    ]
    optimiser: torch.optim.Optimizer = (
        torch.optim.Adam(groups)
        if method.config.optimizer == "adam"
        else torch.optim.SGD(groups, momentum=method.config.momentum)
    )
    iterations, expected = (2 if "resnet-bert" in case.values() else 3), []
    reference = in_double(build(make, case), scenes)
    start = images.detach().clone(), texts.detach().clone()
    for iteration in range(iterations):
        loss = plain_loss(reference, images, texts, iteration, scenes)
        expected.append(loss.item())
        images.grad, texts.grad = torch.autograd.grad(loss, [images, texts])
        for tensor in (images, texts):
            norm = tensor.grad.norm() if tensor.grad is not None else torch.zeros(())
            if tensor.grad is not None and norm > 1:
                tensor.grad = tensor.grad / (norm + 1e-6)
        optimiser.step()
    _, progress = distill(method, iterations, progress=False, clip=1.0)
    np.testing.assert_allclose(progress.history["loss"], expected, rtol=1e-7)
    both = ((method.set.images, images, start[0]), (method.set.texts, texts, start[1]))
    for mine, theirs, before in both:
        assert mine.dtype == torch.float64
        moved = (theirs - before).norm()
        assert moved > 0
        assert (mine - theirs).norm() <= 1e-6 * moved


def build(make: Make, case: dict[str, Any]) -> Mdm:
    case = dict(case)
    way = case.pop("way", None)
    method = make(**case)
    if way is None:
        return method
    return Mdm(method.config.model_copy(update={"model": way}), with_experts(method, way))


def with_experts(method: Mdm, way: str) -> Context:
    return replace(method.context, prepared=None) if way == "pretrained" else method.context


# -- what the method promises ----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_gradients_touch_the_set_only(make: Make, protocol: Protocol) -> None:
    method = make(protocol)
    context = method.context
    before = {n: p.detach().clone() for n, p in context.model.named_parameters()}
    kept = [context.prepared.read(e, s).clone() for e in range(3) for s in range(3)]
    distill(method, 3, progress=False)
    assert all(p.grad is None for p in context.model.parameters())
    assert all(torch.equal(before[n], p) for n, p in context.model.named_parameters())
    after = [context.prepared.read(e, s) for e in range(3) for s in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))
    assert method.snapshots is not None
    assert all(torch.equal(method.snapshots.read(e, s), kept[3 * e + s]) for e, s in ((0, 0),))
    assert {n for n, t in method.learnables().items() if t.grad.abs().max() > 0} == {
        "images",
        "texts",
    }


def test_no_alpha_is_the_common_start(make: Make) -> None:
    method = make(alpha=0.0)
    start = dict(method.layout.named(method.layout.parts(method.context.prepared.read(0, 0))))
    for iteration in range(3):
        parameters, ratios = method.draw_model(iteration)
        assert ratios is not None
        assert list(parameters) == list(trained_parameters(method.model, "image+text_head"))
        assert all(torch.equal(parameters[name], start[name]) for name in parameters)


def test_experts_with_a_common_start(make: Make) -> None:
    """They share their first snapshot and nothing later; otherwise each has its own projections."""
    common, own = make().context.prepared, make(common_start=False).context.prepared
    assert common.folder != own.folder
    assert torch.equal(common.read(0, 0), common.read(1, 0))
    assert not torch.equal(common.read(0, 1), common.read(1, 1))
    first, second = own.read(0, 0), own.read(1, 0)
    heads = sum(size for part, size in own.layout.sizes.items() if "head" in part)
    assert torch.equal(first[:-heads], second[:-heads])
    assert not torch.equal(first[-heads:], second[-heads:])


def test_displacements_from_other_projections_do_not_agree(make: Make) -> None:
    """Why the start must be common: the projections' t, the last two layers."""
    settings = {"experts": SETTINGS["experts"] | {"batch_size": 40}}
    common, own = make(**settings), make(**settings, common_start=False)
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for iteration in range(8):
        for method in (common, own):
            found = method.draw_model(iteration)[1]
            assert found is not None
            ratios[method.config.common_start].append(found[-2:].mean().item())
    assert np.mean(ratios[False]) < 0.1 < 0.5 < np.mean(ratios[True])


def test_two_experts_are_drawn_and_every_snapshot_but_the_start(make: Make) -> None:
    method = make(model="scenes-tiny")
    assert method.snapshots is not None
    asked: list[tuple[int, int]] = []
    read = method.snapshots.read

    def listen(expert: int, snapshot: int) -> Tensor:
        asked.append((expert, snapshot))
        return read(expert, snapshot)

    method.snapshots.read = listen  # type: ignore[method-assign]
    for iteration in range(60):
        asked.clear()
        method.draw_model(iteration)
        (a, b) = [item for item in asked if item[1] > 0]
        assert a[0] != b[0]
        assert [item for item in asked if item[1] == 0] == [(0, 0), (0, 0)]
    assert method.snapshots.reads == 3 * 2 + 1  # every snapshot once, however often it is drawn


def test_the_same_experts_as_the_command_line_trains(
    make: Make, make_context: MakeContext, buffers: Path, tmp_path: Path
) -> None:
    """`mmdd experts` fills the buffer that a run asks for."""
    config = RunConfig.model_validate(
        {
            "method": "mdm",
            "pairs": 4,
            "protocol": "heads",
            "dataset": {"train": 40, "val": 20, "test": 20},
            "settings": SETTINGS | {"experts": SETTINGS["experts"] | {"count": 2, "epochs": 1}},
            "runtime": {"experts": str(tmp_path), "progress": False},
        }
    )
    assert expert_jobs.train_expert(config, 0) == 0
    settings: Any = config.settings
    context = replace(make_context("heads"), model_config=config.identity()["model"])
    folder = buffer_folder(settings.experts, Mdm.expert_context(settings, context), tmp_path)
    assert folder.exists()
    assert folder != buffer_folder(settings.experts, context, tmp_path)


@pytest.mark.parametrize("frozen", ["images", "texts"])
def test_a_side_that_is_not_learned_stays(make: Make, frozen: str) -> None:
    method = make(**{f"learn_{frozen}": False})
    before = {name: p.detach().clone() for name, p in method.set.named_parameters()}
    distill(method, 3, progress=False)
    moved = [n for n, p in method.set.named_parameters() if not torch.equal(before[n], p)]
    assert moved == list(method.learnables()) == [n for n in ("images", "texts") if n != frozen]


def test_a_side_that_no_term_sees_has_no_gradient(make: Make) -> None:
    method = make(features="singles", lambda_contrastive=0.0, lambda_discrepancy=0.0)
    terms = method.backward(0)
    assert set(terms) == {"loss", "image", "ratio"}
    assert method.set.texts.grad is not None
    assert method.set.texts.grad.abs().max() == 0
    assert method.set.images.grad is not None
    assert method.set.images.grad.abs().max() > 0


def test_distributions_get_closer(make: Make) -> None:
    changes: dict[str, Any] = {"optimizer": "adam", "lr_image": 0.03, "lr_text": 0.03}
    method = make(real_batch=40, pairs=10, **changes)
    _, progress = distill(method, 60, progress=False)
    history = progress.history
    weighted = np.array(history["contrastive"]) + 0.8 * (
        np.array(history["agreement"]) + np.array(history["discrepancy"])
    )
    np.testing.assert_allclose(history["loss"], weighted, rtol=1e-5)
    # The diagonal of ten points alone is worth √0.1: the energies cannot come near 0.
    for name, share in (("contrastive", 0.5), ("agreement", 0.97), ("discrepancy", 0.97)):
        assert np.mean(history[name][-10:]) < share * np.mean(history[name][:10])


@pytest.mark.parametrize("way", ["pretrained", "weighted-sum", "interpolation"])
def test_interrupted_equals_uninterrupted(make: Make, way: str, tmp_path: Path) -> None:
    case = {"way": way, "optimizer": "adam", "lr_image": 0.02, "lr_text": 0.01}
    case |= {"synthetic_batch": 4}
    whole, expected = distill(build(make, case), 6, progress=False)
    path = tmp_path / "checkpoint.safetensors"
    for end in (2, 5, 6):
        method = build(make, case)
        result, progress = distill(method, end, checkpoint=path, progress=False)
    assert torch.equal(result.images, whole.images)
    assert torch.equal(result.texts, whole.texts)
    assert progress.history == expected.history
    assert len(progress.history["loss"]) == 6


def test_seeds_decide_and_global_generators_do_not(make: Make) -> None:
    def once(seed: int, noise: int) -> Any:
        # A text encoder with dropout: it must be off.
        method = make("both", model="resnet-bert", seed=seed, synthetic_batch=4)
        torch.manual_seed(noise)
        np.random.seed(noise)  # noqa: NPY002
        before = torch.get_rng_state()
        result, _ = distill(method, 2, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        return result

    first, again, other = once(0, 1), once(0, 2), once(1, 1)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.texts, again.texts)
    assert not torch.equal(first.images, other.images)


def test_lower_precision(make: Make) -> None:
    exact, rough = make(), make(precision="bfloat16")
    a, b = (m.backward(0)["loss"].item() for m in (exact, rough))
    assert a != b
    assert b == pytest.approx(a, rel=0.05)
    for mine, theirs in zip(rough.learnables().values(), exact.learnables().values(), strict=True):
        assert mine.dtype == mine.grad.dtype == torch.float32
        cosine = torch.cosine_similarity(mine.grad.flatten(), theirs.grad.flatten(), dim=0)
        assert cosine > 0.9


def test_the_exported_set(make: Make) -> None:
    method = make("both")
    result, _ = distill(method, 1, progress=False)
    assert result.metadata["method"] == "mdm"
    assert result.metadata["settings"] == method.config.model_dump(mode="json")
    start = method.context.start
    assert result.metadata["source_images"] == start.metadata["source_images"]
    assert start.text_mask is not None
    padding = ~start.text_mask
    assert torch.equal(result.texts[padding], start.texts[padding])


def test_what_is_refused(make: Make) -> None:
    one = {"experts": SETTINGS["experts"] | {"count": 1}}
    with pytest.raises(ConfigError, match=r"'interpolation' draws 2 experts, but .* is 1"):
        make(**one)
    with pytest.raises(ConfigError, match="at least two synthetic"):
        make(pairs=1)
    with pytest.raises(ConfigError, match="mdm has nothing to learn"):
        make(learn_images=False, learn_texts=False)
    with pytest.raises(ConfigError, match="mdm has no loss"):
        make(lambda_contrastive=0.0, lambda_agreement=0.0, lambda_discrepancy=0.0)
    for wrong in (
        {"real_batch": 1},
        {"synthetic_batch": 1},
        {"sigma": 0.0},
        {"alpha": -0.1},
        {"features": "sum"},
        {"kernel": "cosine"},
        {"optimizer": "lbfgs"},
        {"lr_imag": 1.0},
    ):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            make(**wrong)
    with pytest.raises(ValidationError, match="model"):
        MdmConfig(**{**SETTINGS, "model": "expert"})


def test_fewer_experts_will_do_for_the_simpler_models(make: Make) -> None:
    base = make()
    settings = base.config.model_copy(
        update={
            "model": "fine-tuned",
            "experts": base.config.experts.model_copy(update={"count": 1}),
        }
    )
    assert Mdm(settings, base.context).backward(0)["loss"] > 0
    nothing, cost = Mdm.prepare(
        base.config.model_copy(update={"model": "pretrained"}), base.context, Path("/nowhere")
    )
    assert (nothing, cost) == (None, {})
