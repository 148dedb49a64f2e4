"""A new method is one file and one row: a made-up one goes all the way with nothing else changed.

And every method of the table offers what method.py declares.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_method import METHOD
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from kineticlip.__main__ import main
from kineticlip.config import Config, load_config
from kineticlip.methods import METHODS
from kineticlip.methods.method import as_video_model
from kineticlip.models.architectures import architecture
from kineticlip.runtime.distributed import Ranks, initialise
from kineticlip.training.run import run_rank

RECIPE = Path(__file__).parents[2] / "configs" / "k400-text4vis-vitb16-f8.yaml"
NAMES = ("red square", "blue circle", "green star")
TINY = (
    "model.arch=ViT-tiny-16", "model.weights=random", "data.resolution=64", "data.num_frames=2",
    "xclip.prompt_heads=2",
)  # fmt: skip


@pytest.fixture
def one_row(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The row, and an environment that a training run leaves as it found it."""
    monkeypatch.setitem(METHODS, "made-up", METHOD)
    before = dict(os.environ)
    initialise(Ranks())
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Six frame folders, two of each class, and their list."""
    for number in range(6):
        (tmp_path / f"v{number}").mkdir()
        rng = np.random.default_rng(number)
        for frame in range(6):
            pixels = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"v{number}" / f"img_{frame + 1:05d}.jpg")
    lines = [f"v{number} 6 {number % 3}\n" for number in range(6)]
    (tmp_path / "list.txt").write_text("".join(lines))
    (tmp_path / "labels.txt").write_text("\n".join(NAMES) + "\n")
    return tmp_path


def settings(videos: Path) -> list[str]:
    return [
        "method=made-up", *TINY, f"output={videos}/run", f"data.train_list={videos}/list.txt",
        f"data.train_root={videos}", f"data.val_list={videos}/list.txt",
        f"data.val_root={videos}", f"data.labels={videos}/labels.txt", "data.min_frames=0",
        "data.workers=1", "test.clips=2", "optim.lr=1e-2", "optim.warmup_epochs=0",
        "train.steps=1", "train.batch_size=4", "train.micro_batch_size=2",
        "train.precision=fp32", "eval.precision=fp32",
    ]  # fmt: skip


def words(pairs: list[str]) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.mark.usefixtures("one_row")
def test_a_made_up_method_goes_all_the_way(
    videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*command: str) -> dict:
        assert main([*command, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    pairs = settings(videos)
    report = printed("info", str(RECIPE), "--classes", "3", *words(pairs))
    assert report["parts"][-1]["name"] == "head"
    config = load_config(RECIPE, pairs)
    before = METHOD.build(config, NAMES)
    trained = sum(p.numel() for p in before.parameters() if p.requires_grad)
    assert report["totals"]["trained"] == trained == (128 + 1) * 3

    run_rank(config, Ranks())  # a step of training, validation, weights
    weights = videos / "run" / "weights.safetensors"
    head = load_file(weights)["head.weight"]
    assert head.shape == (3, 128) and not torch.equal(head, before.get_parameter("head.weight"))
    capsys.readouterr()

    scored = words([f"model.weights={weights}", *pairs[:2], *pairs[3:]])
    pixels = printed("eval", "--config", str(RECIPE), *scored, "--scores", "--out", f"{videos}/a")
    assert pixels["scored"] == 6 and pixels["protocol"]["method"] == "made-up"
    features = str(videos / "features")
    written = printed("features", "--config", str(RECIPE), *scored, "--out", features)
    assert (written["written"], written["rows"]) == (6, "frame embeddings")
    printed(
        "eval", "--config", str(RECIPE), *scored, "--scores", "--out", f"{videos}/b",
        "--features", features,
    )  # fmt: skip
    one, other = (load_file(videos / name / "scores.safetensors")["scores"] for name in "ab")
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert one.std() > 1e-5


def tiny(method: str, *more: str) -> Config:
    return load_config(None, [f"method={method}", *TINY, *more])


@pytest.mark.parametrize("name", METHODS)
def test_every_model_offers_what_the_record_promises(name: str) -> None:
    config = tiny(name)
    model = METHODS[name].build(config, NAMES).eval()
    offered = as_video_model(model)
    assert isinstance(offered.visual, nn.Module)
    assert any(key.startswith("visual.") for key in model.state_dict())
    assert "visual" in offered.untrained
    assert all(isinstance(getattr(model, part), nn.Module | nn.Parameter)
               for part in offered.untrained)  # fmt: skip
    assert offered.plain_tower in (True, False)
    rows = offered.classifier
    assert rows is None or rows.shape == (len(NAMES), architecture("ViT-tiny-16").embed)
    if isinstance(rows, Tensor):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(NAMES)))
    parts = METHODS[name].cost(config, architecture("ViT-tiny-16"), len(NAMES))
    assert parts and any(part.name.startswith("visual") for part in parts)


@pytest.mark.parametrize("name", METHODS)
def test_plain_towers_are_called_with_images_alone(name: str) -> None:
    """`plain_tower` lets evaluation put a compiled twin in the tower's place."""
    model = METHODS[name].build(tiny(name), NAMES).eval()
    calls: list[bool] = []
    model.get_submodule("visual").register_forward_hook(
        lambda module, inputs, options, out: calls.append(len(inputs) == 1 and not options),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(torch.zeros(1, 2, 3, 64, 64, dtype=torch.uint8))
    assert calls == [as_video_model(model).plain_tower]
