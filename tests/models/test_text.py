"""Weights and where they are found, the tokenizer, the text tower, and its features on disk."""

from __future__ import annotations

import json
import logging
import urllib.error
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kineticlip.config import Config, DataConfig, ModelConfig, Text4VisConfig
from kineticlip.formats.convert import convert
from kineticlip.methods import METHODS
from kineticlip.methods.text4vis import build
from kineticlip.models import text
from kineticlip.models.architectures import VisionShape, architecture
from kineticlip.models.classifier import build_classifier
from kineticlip.models.text import encode_text, text_features, text_tower, tokenize
from kineticlip.models.weights import Weights, resolve_weights
from kineticlip.runtime.errors import UserError
from text4vis_golden import ARCHITECTURE, ATOL, GOLDEN, tensors

TOKENS = json.loads((GOLDEN / "tokens.json").read_text())
TINY = architecture("ViT-tiny-16")


def test_tokens_of_the_official_code() -> None:
    prompts = [TOKENS["template"].format(name) for name in TOKENS["class_names"]]
    assert tokenize(prompts).tolist() == TOKENS["tokens"]
    assert tokenize(TOKENS["stress"]).tolist() == TOKENS["stress_tokens"]
    with pytest.raises(UserError, match="at most 77"):
        tokenize([TOKENS["long_text"]])
    assert tokenize([TOKENS["long_text"]], truncate=True).tolist() == TOKENS["long_truncated"]


def test_features_of_the_official_code() -> None:
    tower = text_tower(ARCHITECTURE.text, tensors("clip_vit_base"))
    golden = tensors("case_text")
    with torch.inference_mode():
        found = encode_text(tower, golden["tokens"].long())
    torch.testing.assert_close(found, golden["text_features"], atol=ATOL, rtol=0)


def test_features_without_the_padding_are_open_clips() -> None:
    tower = text_tower(replace(TINY.text, activation="gelu"), None, seed=2)
    tokens = tokenize(["a", "a video of a person riding a very tall unicycle."])
    with torch.inference_mode():
        torch.testing.assert_close(encode_text(tower, tokens), tower(tokens), atol=1e-5, rtol=0)


def test_random_towers_follow_their_seed() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (text_tower(TINY.text, None, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.text_projection, same.text_projection)
    assert not torch.equal(one.text_projection, other.text_projection)
    assert torch.equal(before, torch.random.get_rng_state())


def test_state_without_a_text_tower() -> None:
    with pytest.raises(UserError, match="no text tower"):
        text_tower(TINY.text, {"visual.proj": torch.zeros(1)})
    with pytest.raises(UserError, match="another text tower"):
        text_tower(TINY.text, tensors("clip_vit_base"))


@pytest.fixture
def tiny_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Weights:
    """A whole CLIP file of the tiny architecture, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from kineticlip.models.vision import VisionTransformer

    assert isinstance(TINY.vision, VisionShape)
    visual = VisionTransformer(TINY.vision).state_dict()
    state = {f"visual.{name}": value for name, value in visual.items()}
    state |= text_tower(TINY.text, None, seed=7).state_dict()
    state["logit_scale"] = torch.tensor(4.0)
    save_file(state, tmp_path / "clip.safetensors")
    return resolve_weights("ViT-tiny-16", str(tmp_path / "clip.safetensors"))


def test_features_are_kept_and_never_stale(
    tiny_file: Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = text_features(tiny_file, ["a cat", "a dog"])
    assert first.shape == (2, 128) and not first.is_inference()
    assert torch.equal(first, text_features(replace(tiny_file, source="again"), ["a cat", "a dog"]))
    swapped = text_features(tiny_file, ["a dog", "a cat"])
    torch.testing.assert_close(swapped, first.flip(0))
    kept = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(kept) == 2

    monkeypatch.setattr(text, "text_tower", lambda *_, **__: pytest.fail("not read from disk"))
    assert torch.equal(text_features(tiny_file, ["a cat", "a dog"]), first)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in kept:
        path.write_bytes(b"not a safetensors file")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(text_features(tiny_file, ["a cat", "a dog"]), first)
    assert "unreadable" in caplog.text


def test_other_bytes_are_other_weights(tiny_file: Weights) -> None:
    first = text_features(tiny_file, ["a cat"])
    assert tiny_file.path is not None
    changed = {**tiny_file.tensors, "text_projection": 2 * tiny_file.tensors["text_projection"]}
    save_file(changed, tiny_file.path)
    again = resolve_weights("ViT-tiny-16", str(tiny_file.path))
    torch.testing.assert_close(text_features(again, ["a cat"]), 2 * first)


def test_features_go_on_without_a_cache(
    tiny_file: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    assert text_features(tiny_file, ["a cat"]).isfinite().all()


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    shape = architecture("ViT-B-32").vision
    assert isinstance(shape, VisionShape)
    state = {
        "visual.conv1.weight": torch.zeros(768, 3, 32, 32),
        "visual.positional_embedding": torch.zeros(shape.tokens, 768),
        **{
            f"visual.transformer.resblocks.{i}.attn.in_proj_weight": torch.zeros(1)
            for i in range(12)
        },
    }
    weights = Weights(architecture("ViT-B-16"), "some.pt", tmp_path)
    weights.__dict__["contents"] = state
    with pytest.raises(UserError, match=r"some.pt: weights of ViT-B-32, not of ViT-B-16"):
        weights.check_fits()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and none of the caches of the machine the test runs on."""

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("weights", ["openai", "laion2b-s34b-b88k", "hf-hub:someone/something"])
def test_weights_that_cannot_be_fetched(weights: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_weights("ViT-B-16", weights)
    message = str(caught.value)
    assert "\n" not in message and f"'{weights}'" in message
    assert "no route to host" in message and "'random'" in message


def test_unknown_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Did you mean 'openai'"):
        resolve_weights("ViT-B-16", "openia")
    with pytest.raises(UserError, match="no weights 'openai' for ViT-tiny-16"):
        resolve_weights("ViT-tiny-16", "openai")
    with pytest.raises(UserError, match=r"classifier.text_weights: no such file"):
        resolve_weights("ViT-B-16", str(tmp_path / "x.pt"), key="classifier.text_weights")
    assert resolve_weights("ViT-B-16", "random").path is None


def test_tags_bring_their_activation_and_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tag found in the hub's cache; what it wants is open_clip's own record."""
    cached = tmp_path / "open_clip_model.safetensors"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(cached))
    openai = resolve_weights("ViT-L/14", "openai")
    assert openai.path == cached and openai.model == architecture("ViT-L-14")
    laion = resolve_weights("ViT-L-14", "laion2b_s32b_b82k")
    assert laion.model.text.activation == "gelu"
    assert laion.model.vision.statistics.mean == (0.5, 0.5, 0.5)


def test_clip_files_are_rounded_as_clip_load_rounds_them(
    tiny_file: Weights, tmp_path: Path
) -> None:
    config = Config(
        model=ModelConfig(arch="ViT-tiny-16", weights=str(tiny_file.path)),
        data=DataConfig(resolution=64),
        text4vis=Text4VisConfig(header="mean"),
    )
    exact = replace(config, model=replace(config.model, rounding="none"))
    product, kept = "transformer.resblocks.0.mlp.c_fc.weight", "class_embedding"
    given = tiny_file.tensors[f"visual.{product}"]
    assert not torch.equal(given, given.half().float())
    assert torch.equal(build(config, ["a"]).visual.state_dict()[product], given.half().float())
    assert torch.equal(build(exact, ["a"]).visual.state_dict()[product], given)
    embedding = tiny_file.tensors[f"visual.{kept}"]
    assert torch.equal(build(config, ["a"]).visual.state_dict()[kept], embedding)
    assert not torch.equal(embedding, embedding.half().float())
    rows, unrounded = (
        build_classifier(config, ["a", "b"], rounded=METHODS["text4vis"].rounds_clip(each)).matrix
        for each in (config, exact)
    )
    assert not torch.equal(rows, unrounded)  # the text tower too; nor does the cache mix them
    torch.testing.assert_close(rows, unrounded, rtol=0.02, atol=0.02)

    for method, rounds in (("contrastive", True), ("bike", True), ("evl", False)):
        assert METHODS[method].rounds_clip(config) == rounds
        assert not METHODS[method].rounds_clip(exact)
    fine_tuned = {n: t for n, t in tiny_file.tensors.items() if n.startswith(("visual", "logit"))}
    torch.save({"epoch": 1, "model_state_dict": fine_tuned}, tmp_path / "tuned.pt")
    tuned = resolve_weights("ViT-tiny-16", str(tmp_path / "tuned.pt"), rounded=True)
    assert torch.equal(tuned.tensors[f"visual.{product}"], given)
    assert tiny_file.path is not None
    convert(tiny_file.path, tmp_path / "own.safetensors", to="kineticlip")
    own = resolve_weights("ViT-tiny-16", str(tmp_path / "own.safetensors"), rounded=True)
    assert torch.equal(own.tensors[f"visual.{product}"], given.half().float())
