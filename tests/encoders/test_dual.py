"""The dual encoder: three ways for a text to enter, heads from a seed, pairs by name."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmdd.encoders import (
    PAIRS,
    DualEncoder,
    ImageEncoderSpec,
    ModelConfig,
    TextEncoderSpec,
    build_model,
)
from mmdd.encoders.dual import MLPHead, resolve_pair
from mmdd.errors import ConfigError

TEXTS = ["a red star", "a small blue ring above a large box", "three things , one is a heart"]
SMALL_BERT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 200,
}
SMALL = ModelConfig(
    pair="cifar-minilm",
    image=ImageEncoderSpec(kind="cifar_resnet", name="resnet20", image_size=32),
    text=TextEncoderSpec(
        kind="huggingface",
        name="minilm",
        pooling="mean",
        max_length=12,
        dropout=0.0,
        config_overrides=SMALL_BERT,
    ),
    dim=12,
)


@pytest.fixture(scope="module", params=["scenes-tiny", "resnet-bert", "lors"])
def model(request: pytest.FixtureRequest) -> DualEncoder:
    configs = {
        "scenes-tiny": ModelConfig(),
        "resnet-bert": SMALL,
        "lors": ModelConfig(image_head="none", text_head="mlp"),
    }
    return build_model(configs[request.param]).eval()


def pixels(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# -- how texts enter -------------------------------------------------------------------------------


def test_ids_embeddings_and_vectors_are_the_same_text(model: DualEncoder) -> None:
    ids, mask = model.text_encoder.tokenize(TEXTS)
    with torch.no_grad():
        z_image, z_ids = model(pixels(), ids, mask)
        _, z_embeddings = model(pixels(), model.text_encoder.embed(ids), mask)
        vectors = model.text_features(ids, mask)
        _, z_vectors = model(pixels(), vectors)
        assert torch.equal(model.embed_images(pixels()), z_image)
        assert torch.equal(model.embed_texts(ids, mask), z_ids)
        assert torch.equal(model.text_features(vectors), vectors)
    assert torch.equal(z_ids, z_embeddings)
    assert torch.equal(z_ids, z_vectors)
    assert z_image.shape == z_ids.shape
    for z in (z_image, z_ids):
        torch.testing.assert_close(z.norm(dim=1), torch.ones(3))


def test_normalisation_can_be_left_out(model: DualEncoder) -> None:
    ids, mask = model.text_encoder.tokenize(TEXTS)
    with torch.no_grad():
        raw = model(pixels(), ids, mask, normalize=False)
        unit = model(pixels(), ids, mask)
        h_image, h_text = model.image_encoder(pixels()), model.text_encoder(ids, mask)
    for p, z in zip(raw, unit, strict=True):
        torch.testing.assert_close(p / p.norm(dim=1, keepdim=True), z)
    torch.testing.assert_close(raw[0], model.image_head(h_image))
    torch.testing.assert_close(raw[1], model.text_head(h_text))


def test_without_a_mask_every_token_counts(model: DualEncoder) -> None:
    ids, mask = model.text_encoder.tokenize(TEXTS[:1])
    length = int(mask.sum())
    with torch.no_grad():
        expected = model.text_features(ids, mask)
        found = model.text_features(model.text_encoder.embed(ids[:, :length]))
        padded = model.text_features(model.text_encoder.embed(ids))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(padded, expected, atol=1e-3)


def test_gradients_reach_embeddings_and_vectors(model: DualEncoder) -> None:
    ids, mask = model.text_encoder.tokenize(TEXTS)
    embeddings = model.text_encoder.embed(ids).detach().requires_grad_()
    weights = torch.rand(3, 1, generator=torch.Generator().manual_seed(1))
    z = model.embed_texts(embeddings, mask)
    (gradient,) = torch.autograd.grad((weights * z[:, :1]).sum(), [embeddings])
    assert torch.isfinite(gradient).all()
    assert (gradient.abs().sum(dim=2) > 0)[mask].all()
    assert gradient[~mask].abs().max() == 0
    vectors = model.text_features(ids, mask).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.embed_texts(vectors)[:, 0].sum(), [vectors])
    assert gradient.abs().max() > 0


def test_other_widths_are_refused(model: DualEncoder) -> None:
    encoder = model.text_encoder
    with pytest.raises(
        ConfigError, match=rf"have 99 entries, this text encoder gives {encoder.dim}"
    ):
        model.text_features(torch.rand(2, 99))
    named = rf"have 99 entries, this text encoder takes {encoder.embedding_dim}"
    with pytest.raises(ConfigError, match=named):
        model.text_features(torch.rand(2, 5, 99))


# -- heads -----------------------------------------------------------------------------------------


def heads(model: DualEncoder) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "_head" in n}


def test_heads_come_from_the_seed_alone(model: DualEncoder) -> None:
    own = deepcopy(model)
    found = []
    for seed, noise in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        own.reset_heads(seed)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(heads(own))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert not torch.equal(next(iter(found[0].values())), next(iter(found[2].values())))
    encoders = {n: t for n, t in model.state_dict().items() if "_head" not in n}
    state = own.state_dict()
    assert all(torch.equal(state[n], t) for n, t in encoders.items())


def test_a_reset_forgets_what_was_learned(model: DualEncoder) -> None:
    own = deepcopy(model)
    own.reset_heads(5)
    fresh = heads(own)
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if "_head" in name:
                parameter.add_(1.0)
    own.reset_heads(5)
    assert all(torch.equal(t, fresh[n]) for n, t in heads(own).items())


def test_build_model_draws_heads_from_its_seed() -> None:
    first, again, other = (build_model(SMALL, seed) for seed in (0, 0, 1))
    assert torch.equal(first.image_head.weight, again.image_head.weight)
    assert not torch.equal(first.image_head.weight, other.image_head.weight)
    # Uniform within 1/sqrt(width), as torch's own linear layers are.
    bound = first.image_encoder.dim**-0.5
    assert 0.9 * bound < first.image_head.weight.abs().max() <= bound


def test_mlp_head_written_out() -> None:
    torch.manual_seed(0)
    head = MLPHead(6, 10).double().eval()
    with torch.no_grad():
        head.norm.weight.uniform_(0.5, 2)
        head.norm.bias.uniform_(-1, 1)
    h = torch.randn(4, 6, dtype=torch.float64)
    first = h @ head.first.weight.T + head.first.bias
    gelu = first * 0.5 * (1 + torch.erf(first / 2**0.5))
    total = first + gelu @ head.second.weight.T + head.second.bias
    centred = total - total.mean(dim=1, keepdim=True)
    unit = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(h), unit * head.norm.weight + head.norm.bias)
    assert head.dropout.p == 0.1
    head.train()
    torch.manual_seed(1)
    assert not torch.equal(head(h), head(h))


# -- by name ---------------------------------------------------------------------------------------


def test_unknown_pairs_and_keys() -> None:
    with pytest.raises(ConfigError, match="unknown encoder pair 'clip'; known: scenes-tiny, cifar"):
        build_model(ModelConfig(pair="clip"))
    with pytest.raises(ValidationError, match="width"):
        ModelConfig(width=3)
    with pytest.raises(ValidationError, match="dim"):
        ModelConfig(dim=0)


def test_wishes_win_over_the_entry() -> None:
    resolved = resolve_pair(SMALL)
    assert resolved.image == SMALL.image
    assert resolved.text == SMALL.text
    assert resolved.dim == 12
    assert resolved.image_head == "linear"
    for name, entry in PAIRS.items():
        assert resolve_pair(ModelConfig(pair=name)) == entry
    assert PAIRS["cifar-minilm"].dim == 128  # the entry itself stays


def test_no_image_projection() -> None:
    model = build_model(ModelConfig(image_head="none", text_head="mlp")).eval()
    with torch.no_grad():
        assert torch.equal(model.image_head(model.image_features(pixels())),
                           model.image_features(pixels()))  # fmt: skip
    assert isinstance(model.text_head, MLPHead)
    with pytest.raises(ConfigError, match="must be the image feature's 128, not 64"):
        build_model(ModelConfig(image_head="none", dim=64))


def test_heads_are_linear_without_bias() -> None:
    model = build_model(SMALL)
    assert set(heads(model)) == {"image_head.weight", "text_head.weight"}
    assert model.image_head.weight.shape == (12, 64)
    assert model.text_head.weight.shape == (12, 16)


def test_the_pair_of_the_papers_keeps_their_widths() -> None:
    entry = PAIRS["nfnet-bert"]
    assert (entry.image.name, entry.text.name) == ("nfnet_l0", "bert-base-uncased")
    assert (entry.dim, entry.image.image_size, entry.text.pooling) == (2304, 224, "cls")
    lors = PAIRS["nfnet-bert-lors"]
    assert (lors.image_head, lors.text_head, lors.dim) == ("none", "mlp", 2304)
