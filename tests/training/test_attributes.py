"""BIKE's attributes branch: the official head, its training, and the commands around it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kineticlip.__main__ import main
from kineticlip.config import ClassifierConfig, Config, ModelConfig, OptimConfig, TrainConfig
from kineticlip.evaluation.result_writer import ResultWriter
from kineticlip.runtime.errors import UserError
from kineticlip.training.attributes import (
    Attributed,
    SentenceHead,
    encode_attributes,
    encode_names,
    fit,
    fuse,
    load_head,
    read_attributes,
    score,
    write_attributes,
)
from text4vis_golden import tensors, under

CPU = torch.device("cpu")
CONFIG = Config(
    model=ModelConfig(arch="ViT-tiny-16", weights="random"),
    classifier=ClassifierConfig(template="bike"),
    optim=OptimConfig(lr=1e-2, warmup_epochs=1, weight_decay=0.0),
    train=TrainConfig(epochs=30, batch_size=8),
)
NAMES = ("archery", "bowling", "capoeira", "dodgeball", "fencing", "golf")


def test_official_logits() -> None:
    golden = tensors("case_bike")
    head = SentenceHead(golden["query_cls"].shape[1])
    head.load_state_dict({**under("sentence_weights.", golden), "logit_scale": torch.tensor(0.0)})
    with torch.inference_mode():
        cosines = head(golden["sentence_cls"], golden["query_cls"])
    torch.testing.assert_close(cosines, golden["sentence_logits"], atol=1e-6, rtol=0)
    scores = score(head, golden["sentence_cls"], golden["query_cls"])
    torch.testing.assert_close(scores, golden["sentence_logits"].softmax(-1), atol=1e-6, rtol=0)


def test_head_starts_as_the_official_one() -> None:
    torch.manual_seed(0)
    head = SentenceHead(128)
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif name.endswith("weight"):
            assert 0.019 < parameter.std() < 0.021, name
    assert head.logit_scale.exp().item() == pytest.approx(100, rel=1e-3)


def test_sentences_list_the_first_five() -> None:
    attributes = {"a": NAMES, "b": NAMES[1:]}
    found = encode_attributes(CONFIG, [("b", 1), ("a", 0), ("b", 2)], attributes, "here", CPU)
    assert found.labels.tolist() == [1, 0, 2]
    expected = encode_names(CONFIG, [",".join(NAMES[1:]), ",".join(NAMES[:5])], device=CPU)
    torch.testing.assert_close(found.sentences, expected[[0, 1, 0]], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="here: no attributes of 1 videos, c and others"):
        encode_attributes(CONFIG, [("c", 0)], attributes, "here", CPU)


def separable(count: int) -> tuple[Attributed, torch.Tensor]:
    """Sentences near a direction that belongs to their class, but is not its own sentence."""
    generator = torch.Generator().manual_seed(0)
    classes = F.normalize(torch.randn(6, 32, generator=generator), dim=-1)
    hidden = F.normalize(torch.randn(6, 32, generator=generator), dim=-1)
    labels = torch.arange(count) % 6
    noise = 0.3 * torch.randn(count, 32, generator=generator) / 32**0.5
    return Attributed(sentences=F.normalize(hidden[labels] + noise, dim=-1), labels=labels), classes


def test_training_learns_what_was_not_there() -> None:
    videos, classes = separable(60)
    torch.manual_seed(CONFIG.seed)
    before = SentenceHead(32)
    head = fit(CONFIG, videos, classes)
    hits = [
        (score(h, videos.sentences, classes).argmax(1) == videos.labels).float().mean()
        for h in (before, head)
    ]
    assert hits[0] < 0.5 and hits[1] > 0.95
    assert head.logit_scale != before.logit_scale
    again = fit(CONFIG, videos, classes)
    other = fit(replace(CONFIG, seed=2), videos, classes)
    weight, same, different = (
        fitted.get_parameter("sentence_fc.0.weight") for fitted in (head, again, other)
    )
    assert torch.equal(weight, same)
    assert not torch.allclose(weight, different)


def test_fusion_is_the_official_weighting() -> None:
    videos, attributes = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.1, 0.9]])
    torch.testing.assert_close(fuse(videos, attributes), torch.tensor([[0.45, 0.55]]))


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_attributes({"v/1.mp4": ["golf", "fencing"]}, path)
    assert json.loads(path.read_text()) == {"v/1.mp4": {"classname_topk": ["golf", "fencing"]}}
    assert read_attributes(path) == {"v/1.mp4": ("golf", "fencing")}
    path.write_text("[1]")
    with pytest.raises(UserError, match="not an attributes file"):
        read_attributes(path)
    with pytest.raises(UserError, match="no such attributes file"):
        read_attributes(tmp_path / "none.json")
    with pytest.raises(UserError, match="no head of width 8"):
        load_head(path, 8)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An evaluation that is right at every second video; its top classes become attributes."""
    rng = np.random.default_rng(0)
    listing = [(f"v{index}", index % 6) for index in range(24)]
    with ResultWriter.open(
        tmp_path / "results", {"weights": "x"}, entries=listing, class_names=NAMES, keep_scores=True
    ) as writer:
        for index, (name, label) in enumerate(listing):
            values = rng.random(6) * 0.1
            values[label if index % 2 else (label + 1) % 6] += 1
            writer.add(name, values / values.sum(), views=1, frames=9, decoder="pyav")
        writer.finish(machine={})
    attributes = tmp_path / "a.json"
    assert main(["attributes", "extract", str(tmp_path / "results"), "--out", str(attributes)]) == 0
    assert len(read_attributes(attributes)) == 24

    (tmp_path / "list.txt").write_text("\n".join(f"{name} {label}" for name, label in listing))
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    settings = {
        "model.arch": "ViT-tiny-16",
        "data.train_list": tmp_path / "list.txt",
        "classifier.template": "bike",
        "optim.lr": "1.0e-3",
        "optim.warmup_epochs": 5,
        "optim.weight_decay": 0,
        "train.epochs": 100,
        "train.batch_size": 12,
    }
    shared = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    shared += ["--weights", "random", "--labels", str(tmp_path / "labels.txt")]
    shared += ["--attributes", str(attributes)]
    head = tmp_path / "head.safetensors"
    assert main(["attributes", "train", "--out", str(head), *shared]) == 0
    capsys.readouterr()
    command = ["attributes", "fuse", str(tmp_path / "results"), "--head", str(head), *shared]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["videos"] == 24 and found["video"]["top1"] == 50.0
    assert found["attributes"]["top1"] > 60
    assert main([*command, "--json", "--share", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["fused"] == found["video"]
