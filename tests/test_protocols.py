"""What each protocol trains: exact names, and what stands still while it does."""

from copy import deepcopy

import pytest
import torch

from mmdd.batches import SetBatches
from mmdd.encoders import (
    DualEncoder,
    ImageEncoderSpec,
    ModelConfig,
    TextEncoderSpec,
    build_model,
)
from mmdd.errors import ConfigError
from mmdd.evaluation import EvaluationConfig, train_student
from mmdd.protocols import (
    PROTOCOLS,
    Protocol,
    component_rates,
    freeze_all_but,
    parameter_groups,
    text_is_tokens,
    trained_parameters,
)
from mmdd.synthetic import SyntheticPairs

HEADS = ["image_head.weight", "text_head.weight"]
IMAGE = [
    *(f"image_encoder.conv{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias", "gain")),
    "image_encoder.linear.weight",
    "image_encoder.linear.bias",
]
LAYER = [
    f"{module}.{kind}"
    for module in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    )
    for kind in ("weight", "bias")
]
TEXT = [f"text_encoder.bert.encoder.layer.{i}.{name}" for i in (0, 1) for name in LAYER]
EMBEDDINGS = [
    f"text_encoder.bert.embeddings.{name}"
    for name in (
        "word_embeddings.weight",
        "position_embeddings.weight",
        "token_type_embeddings.weight",
        "LayerNorm.weight",
        "LayerNorm.bias",
    )
]
TRAINED = {
    "heads": HEADS,
    "image+text_head": IMAGE + HEADS,
    "both": IMAGE + TEXT + HEADS,
}


@pytest.fixture(scope="module")
def scenes_model() -> DualEncoder:
    return build_model(ModelConfig())


@pytest.fixture(scope="module")
def resnet_model() -> DualEncoder:
    return build_model(
        ModelConfig(
            pair="cifar-minilm",
            image=ImageEncoderSpec(kind="cifar_resnet", name="resnet20", image_size=32),
            text=TextEncoderSpec(
                kind="huggingface",
                name="minilm",
                pooling="mean",
                max_length=8,
                config_overrides={
                    "hidden_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "intermediate_size": 32,
                    "vocab_size": 50,
                },
            ),
            dim=8,
        )
    )


def train(model: DualEncoder, protocol: Protocol) -> DualEncoder:
    generator = torch.Generator().manual_seed(0)
    width = model.text_encoder.dim
    texts = torch.randn((6, 5, width) if text_is_tokens(protocol) else (6, width))
    pairs = SyntheticPairs(torch.rand(6, 3, 32, 32, generator=generator), texts)
    config = EvaluationConfig(epochs=2, lr_image=0.01, lr_text=0.01, lr_heads=0.1)
    source = SetBatches(pairs, torch.device("cpu"))
    return train_student(source, model, protocol, config, 0, device=torch.device("cpu"))


def test_the_list_of_protocols() -> None:
    assert set(PROTOCOLS) == set(TRAINED)
    assert {p: text_is_tokens(p) for p in PROTOCOLS} == {
        "both": True,
        "image+text_head": False,
        "heads": False,
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_trained_names_of_scenes_tiny(scenes_model: DualEncoder, protocol: Protocol) -> None:
    everything = [name for name, _ in scenes_model.named_parameters()]
    assert sorted(everything) == sorted(IMAGE + TEXT + EMBEDDINGS + HEADS)
    trained = trained_parameters(scenes_model, protocol)
    assert sorted(trained) == sorted(TRAINED[protocol])
    for name, parameter in scenes_model.named_parameters():
        if name in trained:
            assert trained[name] is parameter


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_students_change_what_is_trained_and_nothing_else(
    scenes_model: DualEncoder, protocol: Protocol
) -> None:
    student = train(deepcopy(scenes_model), protocol)
    before = dict(scenes_model.named_parameters())
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(TRAINED[protocol])
    buffers = dict(scenes_model.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in student.named_buffers())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_batch_norm_trains_its_scale_but_keeps_its_statistics(
    resnet_model: DualEncoder, protocol: Protocol
) -> None:
    student = train(deepcopy(resnet_model), protocol)
    before = dict(resnet_model.named_parameters())
    buffers = dict(resnet_model.named_buffers())
    assert sum("running" in name for name in buffers) == 2 * 19
    for name, buffer in student.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert ("image_encoder.bn1.weight" in moved) == (protocol != "heads")
    assert not any("embeddings" in name for name in moved)
    assert any("text_encoder" in name for name in moved) == (protocol == "both")


def test_freezing_is_undone_by_the_next_protocol(scenes_model: DualEncoder) -> None:
    model = deepcopy(scenes_model)
    for protocol in ("heads", "both", "image+text_head"):
        trained = freeze_all_but(model, protocol)
        asking = [n for n, p in model.named_parameters() if p.requires_grad]
        assert asking == list(trained)
        assert sorted(asking) == sorted(TRAINED[protocol])


def test_a_head_that_is_not_there() -> None:
    model = build_model(ModelConfig(dim=128, image_head="none", text_head="mlp"))
    text_head = [
        f"text_head.{layer}.{kind}"
        for layer in ("first", "second", "norm")
        for kind in ("weight", "bias")
    ]
    assert sorted(trained_parameters(model, "heads")) == sorted(text_head)
    assert sorted(trained_parameters(model, "image+text_head")) == sorted(IMAGE + text_head)


def test_rates_by_part(scenes_model: DualEncoder) -> None:
    rates = component_rates(1.0, 2.0, 3.0)
    groups = parameter_groups(trained_parameters(scenes_model, "both"), rates)
    names = {id(p): n for n, p in scenes_model.named_parameters()}
    found = [(g["lr"], sorted(names[id(p)] for p in g["params"])) for g in groups]
    assert found == [
        (1.0, sorted(IMAGE)),
        (3.0, ["image_head.weight"]),
        (2.0, sorted(TEXT)),
        (3.0, ["text_head.weight"]),
    ]
    groups = parameter_groups(trained_parameters(scenes_model, "heads"), rates)
    assert [g["lr"] for g in groups] == [3.0, 3.0]


def test_learned_rates_go_to_the_branch_or_the_part_that_they_name() -> None:
    rates = component_rates(1.0, 2.0, 3.0, {"image": 4.0, "text_head": 5.0})
    assert rates == {"image_encoder": 4, "image_head": 4, "text_encoder": 2, "text_head": 5}
    rates = component_rates(1.0, 2.0, 3.0, {"image_head": 6.0, "image": 4.0})
    assert rates == {"image_encoder": 4, "image_head": 6, "text_encoder": 2, "text_head": 3}
    with pytest.raises(ConfigError, match="'head'; known: image_encoder"):
        component_rates(1.0, 2.0, 3.0, {"head": 4.0})
