"""Cached trunk outputs: heads that read them score and train as they do on pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from kineticlip.__main__ import main
from kineticlip.config import Config, load_config
from kineticlip.data.batch import BadVideo, VideoViews
from kineticlip.data.entries import Entry
from kineticlip.evaluation.feature_store import (
    INDEX,
    FeatureClips,
    FeatureStore,
    FeatureViews,
    cut_of,
    facts_of,
    open_store,
)
from kineticlip.evaluation.feature_writer import write_features
from kineticlip.evaluation.ready import ReadyModel
from kineticlip.methods import METHODS
from kineticlip.runtime.errors import UserError
from moving_clips import moving_clips

NAMES = ("juggling", "yoga", "zumba")
CPU = torch.device("cpu")
TINY = (
    "model.arch=ViT-tiny-16",
    "model.weights=random",
    "classifier.source=random_normal",
    "data.num_frames=3",
    "data.resolution=64",
    "evl.layers=2",
    "text4vis.header_layers=1",
    "train.micro_batch_size=2",
    "test.clips=2",
)


def settings(method: str, *more: str) -> Config:
    return load_config(None, [*TINY, f"method={method}", *more])


def entries(count: int) -> list[Entry]:
    return [Entry(f"v{n}", f"v{n}", n % len(NAMES)) for n in range(count)]


def views(listed: Sequence[Entry]) -> Iterator[VideoViews | BadVideo]:
    """Two clips of three of five frames, and the same crop twice; `v1` cannot be read."""
    for entry in listed:
        if entry.name == "v1":
            yield BadVideo(entry.name, entry.label, "is no video")
            continue
        generator = torch.Generator().manual_seed(int(entry.name[1:]))
        yield VideoViews(
            name=entry.name,
            label=entry.label,
            images=torch.randint(0, 256, (5, 1, 3, 64, 64), generator=generator, dtype=torch.uint8),
            frame_index=torch.tensor([[0, 1, 2], [2, 3, 4]]),
            crop_index=torch.tensor([0, 0]),
            decoder="made",
            num_frames=5,
        )


@pytest.fixture(params=["text4vis", "evl"])
def made(request: pytest.FixtureRequest, tmp_path: Path):
    """(configuration with features, method, model, entries) of a method."""
    config = settings(request.param)
    method = METHODS[request.param]
    model = method.build(config, NAMES).eval()
    with torch.no_grad():  # where a query starts at zero, tokens hardly matter
        for name, parameter in model.named_parameters():
            if name.startswith(("decoder.", "proj.")):
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    listed, folder = entries(5), tmp_path / "features"
    facts = facts_of(config, method, model)
    ready = ReadyModel(model=model, device=CPU, chunk=4)
    encode = cut_of(config, method, model).encode
    count = write_features(
        folder, views, listed, encode=encode, facts=facts, ready=ready, shard_bytes=1
    )
    assert count == (4, 1)
    config = replace(config, data=replace(config.data, features=str(folder)))
    return config, method, model, listed


def test_scores_are_those_of_the_pixels(made) -> None:
    config, method, model, listed = made
    store = open_store(config, method, model)
    cached = [item for item in FeatureViews(store, listed) if isinstance(item, VideoViews)]
    direct = [item for item in views(listed) if isinstance(item, VideoViews)]
    with torch.inference_mode():
        expected = method.score(model, direct, 6)
        torch.testing.assert_close(method.score(model, cached, 6), expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-4  # the videos do differ
    bad = next(iter(FeatureViews(store, listed[1:2])))
    assert bad == BadVideo("v1", 1, "is no video")


def test_gradients_are_those_of_the_pixels(made) -> None:
    config, method, model, listed = made
    store = open_store(config, method, model, any_views=True)
    clips = FeatureClips(store, listed, config)
    assert list(clips.bad) == ["v1"] and len(clips) == 2
    batch = next(clips.epoch(0))
    pixels = {
        item.name: item.clips()[:2]  # the two crops are one
        for item in views(listed)
        if isinstance(item, VideoViews)
    }
    matches = []
    for name, rows in zip(batch.names, batch.pixels, strict=True):
        with torch.inference_mode():
            both = model(pixels[name])
            matches.append(int((both - model(rows[None])).abs().sum(dim=1).argmin()))
    chosen = torch.stack([pixels[n][m] for n, m in zip(batch.names, matches, strict=True)])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    found, expected = (
        torch.autograd.grad(cross_entropy(model(x), batch.labels), trained, allow_unused=True)
        for x in (batch.pixels, chosen)
    )
    largest = max(float(g.abs().max()) for g in expected if g is not None)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert float((one - other).abs().max()) <= 1e-5 * largest


def test_epochs_follow_the_loader_and_show_every_view(made) -> None:
    config, method, model, listed = made
    clips = FeatureClips(open_store(config, method, model), listed, config)
    whole = [batch for epoch in range(8) for batch in clips.epoch(epoch)]
    again = list(clips.epoch(3, 1))
    assert torch.equal(again[0].pixels, whole[3 * len(clips) + 1].pixels)
    names = [name for batch in whole for name in batch.names]
    assert {name: names.count(name) for name in set(names)} == dict.fromkeys(
        ("v0", "v2", "v3", "v4"), 8
    )
    shown = {float(row.sum()) for batch in whole for row in batch.pixels}
    assert len(shown) >= 8  # four videos, two clips of each


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    config, method = settings("text4vis", "text4vis.header=mean"), METHODS["text4vis"]
    model: Any = method.build(config, NAMES).eval()
    facts, listed = facts_of(config, method, model), entries(6)
    seen: list[str] = []

    def killed(todo: Sequence[Entry]) -> Iterator[VideoViews | BadVideo]:
        for item in views(todo):
            seen.append(item.name)
            if len(seen) == 5:
                raise KeyboardInterrupt
            yield item

    def write(stream, shard_bytes: int) -> None:
        ready = ReadyModel(model=model, device=CPU, chunk=4)
        write_features(
            tmp_path / "f", stream, listed, encode=cut_of(config, method, model).encode,
            facts=facts, ready=ready, shard_bytes=shard_bytes,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        write(killed, 2 * 5 * 128 * 4)  # two videos a shard
    assert seen == ["v0", "v1", "v2", "v3", "v4"]
    seen.clear()

    def watched(todo: Sequence[Entry]) -> Iterator[VideoViews | BadVideo]:
        seen.extend(entry.name for entry in todo)
        return views(todo)

    write(watched, 1)
    assert seen == ["v3", "v4", "v5"]
    store = FeatureStore(tmp_path / "f", facts)
    assert all(entry.name in store for entry in listed)
    for item in views(listed):
        if isinstance(item, VideoViews):
            cached = store.read(Entry(item.name, "", item.label))
            assert isinstance(cached, VideoViews)
            with torch.no_grad():
                expected = model.visual(item.images.flatten(0, 1))
            torch.testing.assert_close(cached.images.flatten(0, 1), expected)


def test_features_of_other_settings_are_refused(made) -> None:
    config, method, model, _ = made
    other = replace(config, test=replace(config.test, clips=3))
    with pytest.raises(UserError, match=r"data.features: .*: clips is 2 there and 3 here"):
        open_store(other, method, model)
    open_store(other, method, model, any_views=True)
    with torch.no_grad():
        model.visual.class_embedding += 1.0
    with pytest.raises(UserError, match="trunk is"):
        open_store(config, method, model)
    with torch.no_grad():
        model.visual.class_embedding -= 1.0
    store = open_store(config, method, model)
    with pytest.raises(UserError, match="has no 'other'"):
        store.read(Entry("other", "other", 0))


def test_trained_trunks_have_no_features() -> None:
    config, method = settings("evl", "evl.finetune=true"), METHODS["evl"]
    with pytest.raises(UserError, match="frozen trunk"):
        facts_of(config, method, method.build(config, NAMES))
    config = settings("text4vis", "text4vis.temporal_module=tokenshift")
    with pytest.raises(UserError, match="mixes them"):
        facts_of(config, METHODS["text4vis"], METHODS["text4vis"].build(config, NAMES))
    config, method = (
        settings("vificlip", "classifier.source=text", "classifier.text_weights=random"),
        METHODS["vificlip"],
    )
    with pytest.raises(UserError, match=r"method vificlip: no features .*: text4vis, evl"):
        facts_of(config, method, method.build(config, NAMES))


def test_the_command_writes_what_eval_and_train_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real files, on the command line: features of a list, scores and a head from them."""
    listing = moving_clips(tmp_path, 4)
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    words = [word for pair in (*TINY, "method=evl", "data.workers=1") for word in ("--set", pair)]
    words += ["--labels", str(tmp_path / "labels.txt"), "--weights", "random"]
    words += ["--set", "eval.precision=fp32", "--list", str(listing), "--root", str(tmp_path)]

    def command(*more: str) -> dict:
        assert main([*more, *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    out = str(tmp_path / "features")
    assert command("features", "--out", out)["written"] == 4
    assert command("features", "--out", out)["written"] == 0  # all there already
    pixels = command("eval", "--out", str(tmp_path / "pixels"), "--scores")
    cached = command("eval", "--out", str(tmp_path / "cached"), "--scores", "--features", out)
    assert pixels["scored"] == cached["scored"] == 4
    left, right = (
        load_file(tmp_path / name / "scores.safetensors")["scores"] for name in ("pixels", "cached")
    )
    torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
    assert (tmp_path / "features" / INDEX).is_file()


def test_the_command_opens_its_list_as_eval_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels out of range are refused, and val_min_frames leaves short entries out."""
    moving_clips(tmp_path, 3)
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    words = ["features", "--out", str(tmp_path / "features"), "--root", str(tmp_path)]
    words += [word for pair in (*TINY, "method=evl", "data.workers=1") for word in ("--set", pair)]
    words += ["--labels", str(tmp_path / "labels.txt"), "--weights", "random", "--json"]
    words += ["--set", "data.val_min_frames=8", "--list", str(tmp_path / "list.txt")]
    (tmp_path / "list.txt").write_text("v0.mp4 0\nv1.mp4 3\n")
    assert main(words) == 2
    assert "list.txt:2: label 3 is out of range: expected 0..2" in capsys.readouterr().err
    (tmp_path / "list.txt").write_text("v0.mp4 9 0\nv1.mp4 7 1\nv2.mp4 0 2\n")
    assert main(words) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["written"] == 1
    assert "1 with fewer than 8 frames left out; 1 without frames left out" in printed.err


def test_the_command_counts_stretches_at_the_configured_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Charades' times are frames of data.frames_per_second, whoever opens the list."""
    moving_clips(tmp_path, 1)  # 9 frames at 10 a second
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    header = "video_id,label,start_time,end_time,total_time\n"
    (tmp_path / "list.csv").write_text(f"{header}v0.mp4,c001,0.5,0.8,0.9\n")
    words = ["features", "--out", str(tmp_path / "features"), "--root", str(tmp_path)]
    words += [word for pair in (*TINY, "method=evl", "data.workers=1") for word in ("--set", pair)]
    words += ["--labels", str(tmp_path / "labels.txt"), "--weights", "random", "--json"]
    words += ["--list", str(tmp_path / "list.csv"), "--set", "data.frames_per_second=10"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["unreadable"] == 0
