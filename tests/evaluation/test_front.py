"""`kineticlip.load` and `kineticlip.evaluate`: every kind of source, and the numbers of `eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import kineticlip
from kineticlip.config import ClassifierConfig, Config, DataConfig, ModelConfig, Text4VisConfig
from kineticlip.evaluation import front
from kineticlip.formats.trained import export_weights
from kineticlip.methods import METHODS
from kineticlip.runtime.errors import UserError
from moving_clips import moving_clips

NAMES = ("left", "right", "up")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A tiny model with its configuration and class names, as training writes it."""
    config = Config(
        model=ModelConfig(arch="ViT-tiny-16", weights="random"),
        classifier=ClassifierConfig(template="{}"),
        data=DataConfig(num_frames=2, resolution=64),
        text4vis=Text4VisConfig(header="mean"),
    )
    state = METHODS["text4vis"].build(config, NAMES).state_dict()
    path = tmp_path / "weights.safetensors"
    export_weights(path, state, config=config, class_names=NAMES, step=1, classifier={})
    return path


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, tuple[str, ...]]]:
    """What load would build, in place of building it: no weights of CLIP are here."""
    calls: list[tuple[Config, tuple[str, ...]]] = []

    def noted(config: Config, names: Sequence[str], **_: Any) -> None:
        calls.append((config, tuple(names)))

    monkeypatch.setattr(front, "load_recognizer", noted)
    return calls


@pytest.mark.parametrize(
    ("source", "options", "arch", "weights", "resolution"),
    [
        ("ViT-B-16", {}, "ViT-B-16", "openai", 224),
        ("ViT-L/14@336px", {}, "ViT-L/14@336px", "openai", 336),
        ("ViT-L/14/laion2b_s32b_b82k", {}, "ViT-L/14", "laion2b_s32b_b82k", 224),
        ("ViT-B-16", {"weights": "hf-hub:someone/something"}, "ViT-B-16",
         "hf-hub:someone/something", 224),
        ("k400-text4vis-vitb16-f8", {}, "ViT-B-16", "openai", 224),
        ("k400-text4vis-vitl14_336-f32", {"weights": "random"}, "ViT-L-14-336", "random", 336),
    ],
)  # fmt: skip
def test_names_become_configurations(
    built: list[tuple[Config, tuple[str, ...]]],
    source: str,
    options: dict[str, Any],
    arch: str,
    weights: str,
    resolution: int,
) -> None:
    kineticlip.load(source, labels=NAMES, **options)
    [(config, names)] = built
    assert (config.model.arch, config.model.weights) == (arch, weights)
    assert (config.data.resolution, names) == (resolution, NAMES)
    plain = not source.startswith("k400")
    assert config.text4vis.header == ("mean" if plain else "transformer")


def test_a_yaml_file_and_its_changes(
    built: list[tuple[Config, tuple[str, ...]]], tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  arch: ViT-tiny-16\ndata:\n  num_frames: 5\n  labels: ucf101\n")
    kineticlip.load(path, precision="fp32", overrides=["test.clips=4", "data.num_frames=6"])
    kineticlip.load(str(path), labels="hmdb51")
    (first, names), (second, others) = built
    assert (first.eval.precision, first.test.clips, first.data.num_frames) == ("fp32", 4, 6)
    assert (second.eval.precision, second.test.clips, second.data.num_frames) == ("bf16", 1, 5)
    assert (len(names), len(others)) == (101, 51)


def test_weights_carry_their_configuration_and_classes(weights: Path, tmp_path: Path) -> None:
    moving_clips(tmp_path, 1)
    recognizer = kineticlip.load(weights, precision="fp32", device="cpu")
    assert recognizer.class_names == NAMES
    assert not recognizer.untrained
    found = recognizer.predict(tmp_path / "v0.mp4")
    assert {name for name, _ in found.ranking} == set(NAMES)
    assert sum(score for _, score in found.ranking) == pytest.approx(1, abs=1e-6)
    other = kineticlip.load(weights, labels=["a", "b"], device=torch.device("cpu"))
    assert other.class_names == ("a", "b")
    assert other.config.classifier.training_labels == str(weights)


def test_an_untrained_model_says_so() -> None:
    assert kineticlip.load("ViT-tiny-16/random", labels=["a", "b"]).untrained


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("ViT-B-61", {}, "no file, recipe or CLIP model of that name. Did you mean 'ViT-B-16'"),
        ("k400-text4vis-vitb16-f9", {}, "Did you mean 'k400-text4vis-vitb16-f8'"),
        ("ViT-B-61/openai", {}, "Did you mean 'ViT-B-16'"),
        ("runs/weights.safetensors", {}, "runs/weights.safetensors: no file, recipe or CLIP model"),
        ("missing.yaml", {}, "missing.yaml: no such config file"),
        ("ViT-tiny-16/openia", {"labels": ["a"]}, "no weights 'openia' for ViT-tiny-16"),
        ("ViT-tiny-16/random", {}, "no class names: give labels="),
        ("ViT-tiny-16/random", {"labels": []}, "no class names: give labels="),
        ("ViT-tiny-16/random", {"labels": ["a", "b", "a"]}, "labels: class 'a' is listed twice"),
        ("ViT-tiny-16/random", {"labels": "ucf102"}, "ucf102: no such label file or built-in set"),
        ("ViT-tiny-16/random", {"labels": ["a"], "device": "gpu"}, "should be cpu, cuda or cuda:N"),
        ("ViT-tiny-16/random", {"labels": ["a"], "device": "meta"}, "got 'meta'"),
        ("ViT-tiny-16/random", {"labels": ["a"], "device": "cuda:99"}, "got 'cuda:99'"),
        ("ViT-tiny-16/random", {"labels": ["a"], "precision": "fp7"}, "'eval.precision': input"),
        ("ViT-tiny-16/random", {"labels": ["a"], "overrides": ["test.clip=3"]}, "'test.clip'"),
    ],
)
def test_mistakes_are_one_line(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        kineticlip.load(source, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_part_without_trained_weights_is_refused(tmp_path: Path, weights: Path) -> None:
    path = tmp_path / "headed.yaml"
    path.write_text(
        "model:\n  arch: ViT-tiny-16\ndata:\n  num_frames: 2\n  resolution: 64\n"
        "classifier:\n  source: random_normal\n"
    )
    with pytest.raises(UserError, match="no trained weights for"):
        kineticlip.load(path, weights=weights, labels=NAMES)


def test_evaluate_gives_the_numbers_of_eval(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kineticlip.__main__ import main

    listing = moving_clips(tmp_path, 5)
    out = tmp_path / "eval"
    words = ["--weights", str(weights), "--list", str(listing), "--root", str(tmp_path)]
    assert main(["eval", *words, "--out", str(out), "--thumbnails", "0", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    recognizer = kineticlip.load(weights, device="cpu")
    kept = tmp_path / "kept"
    found = kineticlip.evaluate(recognizer, listing, root=tmp_path, out=kept)
    for key in ("protocol", "top1", "top5", "top1_interval", "scored", "bad", "classes"):
        assert found[key] == expected[key], key
    assert found["scored"] == 5
    assert (kept / "results.parquet").is_file()
    again = kineticlip.evaluate(recognizer, listing, root=tmp_path, out=kept)
    assert again["speed"] == found["speed"]  # nothing was left to score
    before = sorted(tmp_path.rglob("*"))
    of_config = kineticlip.evaluate(recognizer.config, listing, root=tmp_path, limit=2)
    assert of_config["scored"] == 2
    assert sorted(tmp_path.rglob("*")) == before  # and nothing is kept without a folder


def test_evaluate_keeps_the_classes_of_the_recogniser(weights: Path, tmp_path: Path) -> None:
    listing = moving_clips(tmp_path, 4)
    recognizer = kineticlip.load(weights, labels=["a", "b", "c", "d"], device="cpu")
    summary = kineticlip.evaluate(recognizer, listing, root=tmp_path)
    assert (summary["classes"], summary["scored"]) == (4, 4)
    few = kineticlip.load(weights, labels=["a", "b"], device="cpu")
    with pytest.raises(UserError, match=r"list\.txt:3"):
        kineticlip.evaluate(few, listing, root=tmp_path)


def test_evaluate_names_its_mistakes(weights: Path, tmp_path: Path) -> None:
    recognizer = kineticlip.load(weights, device="cpu")
    with pytest.raises(UserError, match="limit should be at least 1, got 0"):
        kineticlip.evaluate(recognizer, moving_clips(tmp_path, 1), root=tmp_path, limit=0)
    with pytest.raises(UserError, match=r"none\.txt"):
        kineticlip.evaluate(recognizer, tmp_path / "none.txt")
