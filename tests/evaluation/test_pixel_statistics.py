"""Weights that want other pixel statistics than CLIP's get them: built, trained on, scored."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip import pretrained
from PIL import Image
from safetensors.torch import load_file, save_file

from kineticlip.config import Config, load_config, override
from kineticlip.data.lists import read_list
from kineticlip.data.scoring_loader import views_of
from kineticlip.data.statistics import CLIP_STATISTICS, PixelStatistics
from kineticlip.evaluation.feature_store import facts_of
from kineticlip.evaluation.recognizer import config_of, load_recognizer, with_weights
from kineticlip.evaluation.run import ListOptions, evaluate_list
from kineticlip.formats.trained import export_weights
from kineticlip.methods import METHODS
from kineticlip.methods.trunk import statistics_of
from kineticlip.models.architectures import VisionShape, architecture
from kineticlip.models.text import text_tower
from kineticlip.models.vision import VisionTransformer
from kineticlip.models.weights import resolve_weights
from moving_clips import moving_clips

NAMES = ("juggling", "yoga", "zumba")
CPU = torch.device("cpu")
HALF = PixelStatistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
WANTED = {"mean": HALF.mean, "std": HALF.std, "quick_gelu": True, "hf_hub": "made/half/", "url": ""}
SETTINGS = [
    "model.arch=ViT-tiny-16",
    "model.weights=half",
    "data.num_frames=3",
    "data.resolution=64",
    "data.workers=1",
    "data.probe_cache=off",
    "evl.layers=2",
    "text4vis.header_layers=1",
    "test.crops=3",
    "eval.precision=fp32",
]


@pytest.fixture(autouse=True)
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published weights of ViT-tiny-16 with the tag `half`, as open_clip lists those of LAION."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    shape = architecture("ViT-tiny-16")
    assert isinstance(shape.vision, VisionShape)
    visual = VisionTransformer(shape.vision).state_dict()
    state = {f"visual.{name}": tensor for name, tensor in visual.items()}
    state |= text_tower(shape.text, None, seed=7).state_dict()
    state["logit_scale"] = torch.tensor(4.0)
    save_file(state, tmp_path / "published.safetensors")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "published.safetensors")
    )
    monkeypatch.setattr(pretrained, "list_pretrained_tags_by_model", lambda name: ["half"])
    monkeypatch.setattr(pretrained, "get_pretrained_cfg", lambda name, tag: WANTED)


def settings(method: str, *more: str) -> Config:
    return load_config(None, [*SETTINGS, f"method={method}", *more])


def trained(method: str, folder: Path) -> Path:
    """The weights of a run that began from `half`, as training exports them."""
    config = settings(method)
    model: Any = METHODS[method].build(config, NAMES)
    with torch.no_grad():  # where a query starts at zero, tokens hardly matter
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    path = folder / f"{method}.safetensors"
    state = model.state_dict()
    export_weights(path, state, config=config, class_names=NAMES, step=1, classifier={})
    return path


@pytest.mark.parametrize("method", ["evl", "vitaclip", "text4vis"])
def test_scores_are_taken_with_the_weights_own_statistics(method: str, tmp_path: Path) -> None:
    listing = moving_clips(tmp_path, 2)
    assert statistics_of(METHODS[method].build(settings(method), NAMES)) == HALF
    path = str(trained(method, tmp_path))
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(NAMES))
    pairs = [f"data.val_list={listing}", f"data.val_root={tmp_path}", f"data.labels={labels}"]
    config = override(with_weights(config_of(path), path), pairs)
    recognizer = load_recognizer(config, NAMES, device=CPU)
    entries = read_list(listing, tmp_path).entries

    def scored(statistics: PixelStatistics) -> torch.Tensor:
        rules = METHODS[method].pipeline
        views = [views_of(e, config, statistics=statistics, pipeline=rules) for e in entries]
        with torch.inference_mode():
            return METHODS[method].score(recognizer.model, views, 16)

    expected = scored(HALF)
    evaluate_list(config, tmp_path / "out", ListOptions(keep_scores=True, quiet=True, thumbnails=1))
    found = load_file(tmp_path / "out" / "scores.safetensors")["scores"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    one = dict(recognizer.predict(entries[0].path).ranking)
    torch.testing.assert_close(
        torch.tensor([one[name] for name in NAMES]), expected[0], atol=1e-5, rtol=0
    )
    if METHODS[method].pipeline == "evl":  # Text4Vis's tower normalises bytes itself
        assert (scored(CLIP_STATISTICS) - expected).abs().max() > 1e-4
    check_thumbnail(tmp_path, config, entries[0].path)


def check_thumbnail(folder: Path, config: Config, video: str) -> None:
    """The kept picture shows the video's own colours."""
    (kept,) = (folder / "out" / "thumbnails").glob("*.jpg")
    shown = np.asarray(Image.open(kept)).mean((0, 1))
    views = views_of(video, config, statistics=CLIP_STATISTICS, pipeline="text4vis")
    np.testing.assert_allclose(shown, views.images[:, 0].float().mean((0, 2, 3)), atol=4)


def test_a_tower_normalises_bytes_with_the_weights_own_statistics() -> None:
    model: Any = METHODS["text4vis"].build(settings("text4vis"), NAMES)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model.visual((pixels / 255 - 0.5) / 0.5)
        torch.testing.assert_close(model.visual(pixels), expected, atol=1e-5, rtol=0)


def test_a_chain_of_runs_keeps_what_its_first_weights_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Libraries that other tests import raise the root's level, or disable loggers that exist.
    log = logging.getLogger("kineticlip.models.weights")
    monkeypatch.setattr(log, "disabled", False)
    caplog.set_level(logging.WARNING, log.name)
    monkeypatch.setattr(logging.root.manager, "disable", 0)
    first = trained("evl", tmp_path)
    second, state = tmp_path / "second.safetensors", load_file(first)
    config = settings("evl", f"model.weights={first}")
    export_weights(second, state, config=config, class_names=NAMES, step=1, classifier={})
    assert resolve_weights("ViT-tiny-16", str(second)).model.vision.statistics == HALF
    bare = tmp_path / "published.safetensors"
    assert resolve_weights("ViT-tiny-16", str(bare)).model.vision.statistics == CLIP_STATISTICS
    assert not caplog.records
    first.unlink()
    assert resolve_weights("ViT-tiny-16", str(second)).model.vision.statistics == CLIP_STATISTICS
    assert "which is not here" in caplog.text


def test_features_of_other_statistics_are_other_features() -> None:
    """Those of bytes are not: the tower, which identifies them, normalises itself."""
    facts = {
        method: facts_of(config, METHODS[method], METHODS[method].build(config, NAMES))
        for method in ("evl", "text4vis")
        for config in [settings(method)]
    }
    assert facts["evl"]["statistics"] == [0.5] * 6
    assert "statistics" not in facts["text4vis"]
