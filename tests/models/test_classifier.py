"""Where classifier rows come from, and their file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from kineticlip.__main__ import main
from kineticlip.config import ClassifierConfig, Config, ModelConfig, Text4VisConfig, load_config
from kineticlip.data.lists import training_list
from kineticlip.evaluation.embeddings import video_embeddings
from kineticlip.methods.text4vis import video_model
from kineticlip.models.classifier import (
    Classifier,
    build_classifier,
    lda_classifier,
    load_classifier,
    project,
    save_classifier,
    sentence_classifier,
)
from kineticlip.models.text import text_features
from kineticlip.models.weights import resolve_weights
from kineticlip.runtime.errors import UserError

NAMES = ("archery", "bowling", "capoeira", "dodgeball")


def configured(**options: Any) -> Config:
    return Config(
        model=ModelConfig(arch="ViT-tiny-16", weights="random"),
        classifier=ClassifierConfig(**options),
        seed=3,
    )


def features_of(*prompts: str) -> torch.Tensor:
    return text_features(resolve_weights("ViT-tiny-16", "random"), prompts, seed=3)


def test_text_rows_are_the_raw_features_of_the_prompts() -> None:
    built = build_classifier(configured(), NAMES)
    expected = features_of(*(f"a video of a person {name}." for name in NAMES))
    assert torch.equal(built.matrix, expected) and built.names == NAMES
    assert built.provenance["weights"] == "random" and built.provenance["seed"] == 3
    other = build_classifier(replace(configured(), seed=4), NAMES)
    assert not torch.allclose(other.matrix, built.matrix)


def test_templates_are_averaged_as_unit_features() -> None:
    templates = ("a photo of {}.", "{} on film")
    built = build_classifier(configured(templates=templates), NAMES)
    parts = [
        F.normalize(features_of(*(template.format(name) for name in NAMES)), dim=-1)
        for template in templates
    ]
    torch.testing.assert_close(built.matrix, (parts[0] + parts[1]) / 2)
    with pytest.raises(UserError, match=r"template 'a video': no \{\}"):
        build_classifier(configured(template="a video"), NAMES)


def test_random_rows() -> None:
    many = [str(number) for number in range(100)]
    normal = build_classifier(configured(source="random_normal", seed=1), many).matrix
    assert normal.shape == (100, 128)
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    again = build_classifier(configured(source="random_normal", seed=1), many).matrix
    assert torch.equal(normal, again)
    other = build_classifier(configured(source="random_normal", seed=2), many).matrix
    assert not torch.allclose(normal, other)

    orthogonal = build_classifier(configured(source="random_orthogonal"), many).matrix
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(100), atol=1e-6, rtol=0)
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((128, 128)))
    torch.testing.assert_close(orthogonal, torch.from_numpy(q[:100]).float())
    with pytest.raises(UserError, match="129 orthogonal rows do not fit in 128"):
        build_classifier(configured(source="random_orthogonal"), [*many, *map(str, range(29))])


def test_new_classes_move_by_the_training_classes_mean(tmp_path: Path) -> None:
    training = build_classifier(configured(center=True), NAMES)
    assert training.center is not None
    torch.testing.assert_close(training.matrix.mean(0), torch.zeros(128), atol=1e-6, rtol=0)
    labels = tmp_path / "training.txt"
    labels.write_text("\n".join(NAMES))
    new = build_classifier(configured(center=True, training_labels=str(labels)), ("juggling",))
    assert new.center is not None and torch.equal(new.center, training.center)
    plain = build_classifier(configured(), ("juggling",))
    torch.testing.assert_close(new.matrix, F.normalize(plain.matrix, dim=-1) - training.center)


def test_new_classes_get_random_rows_of_their_own(tmp_path: Path) -> None:
    labels = tmp_path / "training.txt"
    labels.write_text("\n".join(NAMES))
    trained = build_classifier(configured(source="random_orthogonal"), NAMES).matrix
    options = configured(source="random_orthogonal", training_labels=str(labels))
    both = build_classifier(options, ("juggling", NAMES[1])).matrix
    torch.testing.assert_close(trained @ both[0], torch.zeros(len(NAMES)), atol=1e-6, rtol=0)
    assert torch.equal(both[1], trained[1])


def test_file_keeps_rows_names_and_provenance(tmp_path: Path) -> None:
    path = tmp_path / "new" / "k.safetensors"
    built = build_classifier(configured(center=True), NAMES)
    save_classifier(built, path)
    loaded = load_classifier(path)
    assert torch.equal(loaded.matrix, built.matrix) and loaded.names == NAMES
    assert loaded.provenance == json.loads(json.dumps(built.provenance))
    assert loaded.center is not None and built.center is not None
    assert torch.equal(loaded.center, built.center)
    assert [item.name for item in path.parent.iterdir()] == ["k.safetensors"]

    chosen = build_classifier(configured(source=str(path)), ("bowling", "archery"))
    assert torch.equal(chosen.matrix, built.matrix[[1, 0]])
    with pytest.raises(UserError, match=r"no row for 1 of 2 classes.*Did you mean 'archery'"):
        build_classifier(configured(source=str(path)), ("archery ", "bowling"))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such classifier file"):
        load_classifier(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="not a classifier file"):
        load_classifier(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"unknown source 'tekst'\. Did you mean 'text'"):
        build_classifier(configured(source="tekst"), NAMES)


@pytest.mark.parametrize("classes", [2, 5])
def test_lda_rows_separate_what_means_alone_do_not(classes: int) -> None:
    """Classes apart along a quiet direction, under a loud one that says nothing."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), 60)
    embeddings = rng.normal(size=(len(labels), 16))
    embeddings[:, 0] *= 30
    embeddings[:, 1:6] += 2.5 * np.eye(5)[labels]
    names = [f"class {index}" for index in range(classes)]
    built = lda_classifier(embeddings, labels, names, shrinkage=0.1)
    assert built.matrix.shape == (classes, 16)
    assert built.provenance["shrinkage"] == 0.1 and built.provenance["videos"] == 60 * classes

    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(embeddings, labels)
    rows = built.matrix.numpy()
    coefficients = rows if classes > 2 else rows[1:] - rows[:1]
    np.testing.assert_allclose(coefficients, reference.coef_, atol=1e-4)
    scores = embeddings @ rows.T
    means = np.stack([embeddings[labels == index].mean(0) for index in range(classes)])
    assert (scores.argmax(1) == labels).mean() > 0.8
    assert ((embeddings @ means.T).argmax(1) == labels).mean() < 0.75


def test_lda_needs_every_class() -> None:
    with pytest.raises(UserError, match="no video of class 'b'"):
        lda_classifier(np.zeros((4, 3)), np.array([0, 0, 2, 2]), ["a", "b", "c"])
    with pytest.raises(UserError, match="label 3 of 2 classes"):
        lda_classifier(np.zeros((2, 3)), np.array([0, 3]), ["a", "b"])


def test_projection() -> None:
    rows = torch.randn(12, 48, generator=torch.Generator().manual_seed(0))
    assert project(rows, 48, how="orthogonal") is rows
    wide = project(rows, 64, how="orthogonal", seed=5)
    torch.testing.assert_close(wide @ wide.T, rows @ rows.T, atol=1e-4, rtol=0)
    assert project(rows, 32, how="orthogonal").shape == (12, 32)
    pca = project(rows, 11, how="pca")
    offset = rows - rows.mean(0)  # 12 centred rows span 11 directions: nothing is lost
    torch.testing.assert_close(pca @ pca.T, offset @ offset.T, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="no 12 directions"):
        project(rows, 12, how="pca")


def test_rows_of_a_language_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NAMES]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    encode = transformers.DistilBertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    model = transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=len(words), dim=24, hidden_dim=32, n_layers=1, n_heads=2
        )
    ).eval()
    encode.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")

    names = (*NAMES, "archery bowling capoeira")  # ragged, so padding must not count
    built = sentence_classifier(tmp_path / "model", names, 24)
    with torch.inference_mode():
        for row, name in zip(built.matrix, names, strict=True):
            states = model(**encode(name, return_tensors="pt")).last_hidden_state[0]
            torch.testing.assert_close(row, states.mean(0), atol=1e-5, rtol=0)
    first = sentence_classifier(tmp_path / "model", names, 128, pooling="first", seed=2)
    assert first.matrix.shape == (5, 128) and first.provenance["projection"] == "orthogonal"
    with pytest.raises(UserError, match="no model folder"):
        sentence_classifier(tmp_path, names, 24)


def test_classifier_of_no_file_has_no_row() -> None:
    with pytest.raises(UserError, match="here: no row for 1 of 1 classes"):
        Classifier(torch.zeros(1, 2), ("a",)).for_names(["b"], "here")


def test_command_builds_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, output = tmp_path / "labels.txt", tmp_path / "k.safetensors"
    labels.write_text("\n".join(NAMES))
    common = ["--labels", str(labels), "--out", str(output), "--json"]
    tiny = ["--set", "model.arch=ViT-tiny-16", "--set", "model.weights=random", "--set", "seed=3"]
    assert main(["classifier", "build", "text", *common, *tiny]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["names"] == list(NAMES) and shown["provenance"]["source"] == "text"
    expected = features_of(*(f"a video of a person {name}." for name in NAMES))
    assert torch.equal(load_classifier(output).matrix, expected)

    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.normal(size=(40, 6))).float()
    groups = torch.arange(40) % 4
    save_file({"embeddings": points, "labels": groups}, tmp_path / "videos.safetensors")
    lda = ["--embeddings", str(tmp_path / "videos.safetensors"), "--shrinkage", "0.2"]
    assert main(["classifier", "build", "lda", *common, *lda]) == 0
    same = lda_classifier(points.numpy(), groups.numpy(), NAMES, shrinkage=0.2)
    assert torch.equal(load_classifier(output).matrix, same.matrix)
    capsys.readouterr()
    assert main(["classifier", "show", str(output)]) == 0
    out = capsys.readouterr().out
    assert "4 classes x 6" in out and "shrinkage: 0.2" in out

    assert main(["classifier", "build", "lda", *common]) == 2
    assert "data.train_list" in capsys.readouterr().err
    assert main(["classifier", "build", "text", "--out", "x.pt"]) == 2
    assert "expected a .safetensors file" in capsys.readouterr().err


def test_lda_of_a_list_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders of frames: dark ones and bright ones, two of each."""
    rng = np.random.default_rng(0)
    lines = []
    for label, base in enumerate((40, 170)):
        for number in range(2):
            folder = tmp_path / f"{label}-{number}"
            folder.mkdir()
            for frame in range(1, 4):
                pixels = rng.integers(base, base + 40, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"img_{frame:05d}.jpg")
            lines.append(f"{folder.name} 3 {label}")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    (tmp_path / "labels.txt").write_text("dark\nbright")
    output = tmp_path / "k.safetensors"
    settings = {
        "model.arch": "ViT-tiny-16",
        "data.resolution": 64,
        "data.num_frames": 2,
        "data.train_list": tmp_path / "list.txt",
        "data.train_root": tmp_path,
        "eval.precision": "fp32",
    }
    pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    build = ["classifier", "build", "lda", "--per-class", "2", "--shrinkage", "0.5", *pairs]
    files = ["--labels", str(tmp_path / "labels.txt"), "--out", str(output)]
    assert main([*build, "--weights", "random", *files, "--json"]) == 0
    provenance = json.loads(capsys.readouterr().out)["provenance"]
    assert provenance["videos"] == 4 and provenance["per_class"] == 2

    config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    config = replace(
        config,
        model=replace(config.model, weights="random"),
        text4vis=Text4VisConfig(header="mean"),
    )
    entries = training_list(config, 2).entries
    found = video_embeddings(config, entries, device=torch.device("cpu"))
    assert found.labels.tolist() == [0, 0, 1, 1] and not found.bad
    model = video_model(config, resolve_weights("ViT-tiny-16", "random"))
    with Image.open(tmp_path / "0-0" / "img_00001.jpg") as first:
        one = torch.from_numpy(np.array(first)).permute(2, 0, 1)
    with Image.open(tmp_path / "0-0" / "img_00002.jpg") as second:
        clip = torch.stack([one, torch.from_numpy(np.array(second)).permute(2, 0, 1)])
    with torch.inference_mode():
        expected = model.eval().encode_clips(clip.unsqueeze(0))[0]
    torch.testing.assert_close(found.matrix[0], expected, atol=1e-5, rtol=0)
    rows = load_classifier(output).matrix
    again = lda_classifier(
        found.matrix.numpy(), found.labels.numpy(), ("dark", "bright"), shrinkage=0.5
    ).matrix
    torch.testing.assert_close(rows, again, atol=1e-4, rtol=1e-4)
    too_many = [word.replace("2", "3") if word == "2" else word for word in build]
    assert main([*too_many, "--weights", "random", *files]) == 2
    assert "has only 2 videos" in capsys.readouterr().err
