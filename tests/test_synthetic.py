"""The distilled set: what it refuses, what it weighs, and that a file is either it or an error."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmdd import synthetic
from mmdd.errors import ArtefactError, ConfigError
from mmdd.files import content_sha256, save_state, save_tensors
from mmdd.sets import describe_file
from mmdd.similarity import (
    FullSimilarity,
    IdentitySimilarity,
    LowRankSimilarity,
    Similarity,
)
from mmdd.synthetic import FORMAT, VERSION, SyntheticPairs


def similarity_of(kind: str | None, n: int) -> Similarity | None:
    if kind is None:
        return None
    if kind == "identity":
        return IdentitySimilarity(n)
    module = FullSimilarity(n) if kind == "full" else LowRankSimilarity(n, rank=2, alpha=0.3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def make(
    kind: str | None = None, *, tokens: bool = False, mask: bool = False, n: int = 3, size: int = 4
) -> SyntheticPairs:
    generator = torch.Generator().manual_seed(n)
    texts = torch.randn((n, 5, 6) if tokens else (n, 6), generator=generator)
    return SyntheticPairs(
        torch.randn(n, 3, size, size, generator=generator),
        texts,
        text_mask=torch.arange(5).expand(n, 5) < 3 if mask else None,
        similarity=similarity_of(kind, n),
        learning_rates={"image": 0.1, "text": 1 / 3},
        metadata={"method": "covmatch", "steps": 400, "licence": None, "nested": {"a": [1, "é"]}},
    )


def assert_equal(a: SyntheticPairs, b: SyntheticPairs) -> None:
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.texts, b.texts)
    assert a.images.dtype == b.images.dtype == torch.float32
    assert (a.text_mask is None) == (b.text_mask is None)
    if a.text_mask is not None and b.text_mask is not None:
        assert b.text_mask.dtype == torch.bool
        assert torch.equal(a.text_mask, b.text_mask)
    assert type(a.similarity) is type(b.similarity)
    if a.similarity is not None and b.similarity is not None:
        assert torch.equal(a.similarity.matrix(), b.similarity.matrix())
    assert a.learning_rates == b.learning_rates
    assert a.metadata == b.metadata


KINDS = [None, "identity", "full", "low_rank"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "mask"), [(False, False), (True, False), (True, True)])
def test_save_and_load(tmp_path: Path, kind: str | None, tokens: bool, mask: bool) -> None:
    path = tmp_path / "folder" / "set.safetensors"
    pairs = make(kind, tokens=tokens, mask=mask)
    pairs.save(path)
    loaded = SyntheticPairs.load(str(path))
    assert_equal(pairs, loaded)
    assert loaded.num_bytes() == pairs.num_bytes()
    assert os.listdir(path.parent) == ["set.safetensors"]


def test_the_same_set_gives_the_same_file(tmp_path: Path) -> None:
    make("low_rank").save(tmp_path / "a")
    make("low_rank").save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_set_under_training_can_be_saved(tmp_path: Path) -> None:
    base = make("low_rank")
    live = SyntheticPairs(
        base.images.transpose(2, 3).requires_grad_(),  # neither a leaf alone nor contiguous
        base.texts.requires_grad_(),
        similarity=base.similarity,
        metadata={10: "a", 9: "b"},  # JSON turns the keys into strings, which sort differently
    )
    live.save(tmp_path / "live")
    loaded = SyntheticPairs.load(tmp_path / "live")
    assert torch.equal(loaded.images, live.images)
    assert not loaded.images.requires_grad
    assert loaded.metadata == {"10": "a", "9": "b"}


@pytest.mark.parametrize(
    ("kind", "extra"),
    [(None, 0), ("identity", 0), ("full", 4 * 9), ("low_rank", 4 * 3 * (2 * 2 + 1))],
)
def test_num_bytes(kind: str | None, extra: int) -> None:
    images, rates = 3 * 3 * 4 * 4 * 4, 2 * 4
    assert make(kind).num_bytes() == images + 3 * 6 * 4 + rates + extra
    assert make(kind, tokens=True).num_bytes() == images + 3 * 5 * 6 * 4 + rates + extra
    masked = make(kind, tokens=True, mask=True).num_bytes()
    assert masked == images + 3 * 5 * 6 * 4 + 3 * 5 + rates + extra


def test_len_and_repr() -> None:
    assert len(make()) == 3
    assert "3 pairs" in repr(make())
    assert "vectors" in repr(make())
    assert "token embeddings" in repr(make(tokens=True))


@pytest.mark.parametrize("kind", KINDS)
def test_to_leaves_the_original_where_it_is(kind: str | None) -> None:
    pairs = make(kind, tokens=True, mask=True)
    before = make(kind, tokens=True, mask=True)
    moved = pairs.to("meta")
    assert moved.images.device.type == moved.texts.device.type == "meta"
    assert moved.text_mask is not None
    assert moved.text_mask.device.type == "meta"
    if moved.similarity is not None:
        assert moved.similarity.matrix().device.type == "meta"
    assert_equal(pairs, before)  # still on the CPU, still the same numbers
    assert moved.learning_rates == pairs.learning_rates
    assert moved.metadata == pairs.metadata


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_to_gives_a_similarity_of_its_own(kind: str) -> None:
    pairs, expected = make(kind), make(kind)
    moved = pairs.to("cpu")
    assert moved.similarity is not None
    with torch.no_grad():
        for parameter in moved.similarity.parameters():
            parameter.zero_()
    assert_equal(pairs, expected)


IMAGES, TEXTS = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("images", "texts", "options", "message"),
    [
        (torch.zeros(2, 4, 4), TEXTS, {}, r"\(N, 3, H, W\)"),
        (torch.zeros(2, 1, 4, 4), TEXTS, {}, r"\(N, 3, H, W\)"),
        (IMAGES[:0], TEXTS[:0], {}, "N ≥ 1"),
        (IMAGES, TEXTS[:1], {}, "texts must be"),
        (IMAGES, torch.zeros(2), {}, "texts must be"),
        (IMAGES.double(), TEXTS, {}, "float32"),
        (IMAGES, TEXTS.half(), {}, "float32"),
        (IMAGES, TEXTS, {"text_mask": torch.ones(2, 5, dtype=torch.bool)}, "text_mask"),
        (IMAGES, TEXTS[:, None], {"text_mask": torch.ones(2, 2, dtype=torch.bool)}, "text_mask"),
        (IMAGES, TEXTS, {"similarity": IdentitySimilarity(3)}, "for 3 pairs, the set has 2"),
    ],
)
def test_contradicting_shapes_are_refused(
    images: torch.Tensor, texts: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        SyntheticPairs(images, texts, **options)


# ---- damaged and foreign files -----------------------------------------------------------------


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    pairs = make("low_rank", tokens=True, mask=True, n=1, size=2)
    path = tmp_path / "set"
    pairs.save(path)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    noticed = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            loaded = SyntheticPairs.load(path)
        except ArtefactError:
            noticed += 1
            continue
        # what is left: a blank for another blank in the JSON of the container
        assert_equal(pairs, loaded)
        assert position < 8 + header
    assert noticed > 0.98 * len(whole)


def test_every_truncation_and_any_addition_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "set"
    make(n=1, size=1).save(path)
    whole = path.read_bytes()
    for damaged in [*(whole[:length] for length in range(len(whole))), whole + b"\0"]:
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError):
            SyntheticPairs.load(path)


def rewrite(path: Path, change: Any) -> None:
    """Change the header of a saved set, keeping its tensors and its checksum as they are."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["mmdd"])
    change(header)
    save_file(load_file(path), path, metadata={"mmdd": json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["similarity"].update(alpha=3.0),
        lambda header: header["learning_rates"].update(image=0.2),
        lambda header: header["metadata"].update(method="random"),
        lambda header: header.update(similarity=None),
        lambda header: header.pop("sha256"),
    ],
)
def test_a_changed_header_is_noticed(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "set"
    make("low_rank").save(path)
    rewrite(path, lambda header: None)
    assert_equal(SyntheticPairs.load(path), make("low_rank"))
    rewrite(path, change)
    with pytest.raises(ArtefactError, match="checksum"):
        SyntheticPairs.load(path)


def test_changed_pixels_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "set"
    make().save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["images"][0, 0, 0, 0] += 1e-3
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ArtefactError, match="checksum"):
        SyntheticPairs.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set"
    with pytest.raises(ArtefactError, match="does not exist"):
        SyntheticPairs.load(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    with pytest.raises(ArtefactError, match="not a readable"):
        SyntheticPairs.load(path)
    save_file({"images": IMAGES, "texts": TEXTS}, path)
    with pytest.raises(ArtefactError, match="not one that mmdd wrote"):
        SyntheticPairs.load(path)
    save_state(path, {"images": IMAGES, "texts": TEXTS})
    with pytest.raises(ArtefactError, match="not a distilled set"):
        SyntheticPairs.load(path)
    save_tensors(path, {"images": IMAGES}, {"format": "mmdd.Experts", "version": 1})
    with pytest.raises(ArtefactError, match=r"holds 'mmdd\.Experts'"):
        SyntheticPairs.load(path)


@pytest.mark.parametrize("version", [0, 2, 99, "2", None, [1], {}])
def test_another_version_is_refused(tmp_path: Path, version: Any) -> None:
    path = tmp_path / "set"
    make().save(path)
    rewrite(path, lambda header: header.update(version=version))
    with pytest.raises(ArtefactError, match=re.escape(f"version {version!r}; this mmdd")):
        SyntheticPairs.load(path)


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["vectors", "tokens"])
def test_a_file_that_version_1_wrote_stays_readable(name: str) -> None:
    """Committed files of the format: who changes the format adds files and keeps these."""
    expected = {
        "vectors": make("full"),
        "tokens": make("low_rank", tokens=True, mask=True),
    }[name]
    assert_equal(SyntheticPairs.load(GOLDEN / f"set-v1-{name}.safetensors"), expected)


def test_an_older_version_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it will be once there is a version 3: a file of version 1 goes through every step."""

    def to_2(content: Any) -> Any:
        tensors, header = content
        return tensors, header | {"version": 2, "learning_rates": {"image": 7.0}}

    def to_3(content: Any) -> Any:
        tensors, header = content
        assert header["version"] == 2
        return tensors | {"texts": tensors["texts"] + 1}, header | {"version": 3}

    path = GOLDEN / "set-v1-vectors.safetensors"
    before = SyntheticPairs.load(path)
    monkeypatch.setattr(synthetic, "VERSION", 3)
    monkeypatch.setattr(synthetic, "_MIGRATIONS", {1: to_2, 2: to_3})
    migrated = SyntheticPairs.load(path)
    assert migrated.learning_rates == {"image": 7.0}
    assert torch.equal(migrated.texts, before.texts + 1)
    assert torch.equal(migrated.images, before.images)
    about = describe_file(path)  # of the set as it is now, and of the file as it stands
    assert (about["version"], about["learning_rates"]) == (1, {"image": 7.0})
    # The checksum is that of the old content, and is verified before any step.
    damaged = tmp_path / "set"
    damaged.write_bytes(path.read_bytes())
    rewrite(damaged, lambda header: header["metadata"].update(method="random"))
    with pytest.raises(ArtefactError, match="checksum"):
        SyntheticPairs.load(damaged)
    # A version without a step, and one from the future, are refused by name.
    for version in (0, 4):
        rewrite(damaged, lambda header, v=version: header.update(version=v))
        with pytest.raises(ArtefactError, match=f"version {version}; this mmdd reads version 3"):
            SyntheticPairs.load(damaged)


def test_the_checksum_is_what_the_page_says(tmp_path: Path) -> None:
    """The code of `book/format.md` that checks a file without mmdd, run as it stands there."""
    page = (Path(__file__).parents[1] / "book" / "format.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (code,) = [block for block in blocks if "hashlib" in block]
    assert "mmdd.synthetic" not in code
    path = GOLDEN / "set-v1-tokens.safetensors"
    scope: dict[str, Any] = {}
    exec(code.replace("set.safetensors", str(path)), scope)
    with safe_open(path, framework="pt") as file:
        assert scope["found"] == json.loads(file.metadata()["mmdd"])["sha256"]


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"images": Trap()}, tmp_path / "set")
    with pytest.raises(ArtefactError):
        SyntheticPairs.load(tmp_path / "set")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("similarity", "learning_rates", "drop"),
    [
        ("identity", {}, None),
        ({"kind": "circulant", "n": 2}, {}, None),
        ({"kind": "full", "n": 3}, {}, None),
        ({"kind": "identity", "n": 0}, {}, None),
        ({"kind": "identity", "n": 2, "rank": 4}, {}, None),
        ({"n": 2}, {}, None),
        (None, 0.1, None),
        (None, {}, "texts"),
    ],
)
def test_a_well_formed_file_with_foreign_content_is_refused(
    tmp_path: Path, similarity: Any, learning_rates: Any, drop: str | None
) -> None:
    # A right checksum only says that the file is what its writer wrote.
    tensors = {name: t for name, t in (("images", IMAGES), ("texts", TEXTS)) if name != drop}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "similarity": similarity,
        "learning_rates": learning_rates,
        "metadata": {},
    }
    header["sha256"] = content_sha256(tensors, header)
    save_tensors(tmp_path / "set", tensors, header)
    with pytest.raises(ArtefactError, match="not a usable distilled set"):
        SyntheticPairs.load(tmp_path / "set")


def test_a_failed_save_keeps_the_old_set(tmp_path: Path) -> None:
    path = tmp_path / "set"
    make("full").save(path)
    broken = make()
    broken.metadata["generator"] = object()  # no JSON value
    with pytest.raises(TypeError):
        broken.save(path)
    assert_equal(SyntheticPairs.load(path), make("full"))
    assert os.listdir(tmp_path) == ["set"]
