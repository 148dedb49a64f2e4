"""`kineticlip parity text4vis`: every recorded file, other sizes, and what a difference does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score

from kineticlip.__main__ import main
from kineticlip.commands.parity import text4vis
from kineticlip.commands.parity.text4vis.files import Golden
from kineticlip.commands.parity.text4vis.models import cases
from kineticlip.commands.parity.text4vis.training import schedule_of
from kineticlip.commands.parity.text4vis.views import evaluate_run, write_frames
from kineticlip.models.architectures import VisionShape
from kineticlip.models.text import encode_text, text_tower

COMMITTED = Path(__file__).parents[1] / "golden" / "text4vis"
# The ResNet's weights alone are 0.7 MB: these files are only in the optional folder.
NOT_COMMITTED = {
    "clip_rn_visual.safetensors",
    "frames_rn.safetensors",
    "case_rn_plain.safetensors",
    "case_rn_tsm.safetensors",
}
# Of these only two of the four pictures are committed, one lying and one standing.
CUT_DOWN = {"crops": {"crops", "crops_src"}, "augmentation": {"train_aug"}}  # part -> .npz files
PARTS = text4vis.parts(Golden(COMMITTED))
RESNET = {name for name in PARTS if name.split("/")[-1].startswith("rn_")}


def replay(folder: Path, part: str) -> dict[str, bool]:
    """The checks of one part: name -> passed."""
    golden = Golden(folder)
    found = {check.name: check.passed for check in text4vis.parts(golden)[part](golden)}
    assert found, f"{part} compares nothing"
    return found


def failures(folder: Path, part: str) -> list[str]:
    return [name for name, passed in replay(folder, part).items() if not passed]


@pytest.mark.parametrize("part", sorted(set(PARTS) - RESNET))
def test_committed_recordings(part: str) -> None:
    assert failures(COMMITTED, part) == []


@pytest.mark.parametrize("part", sorted(RESNET | CUT_DOWN.keys()))
def test_recordings_that_are_not_committed_whole(shared: Path, part: str) -> None:
    assert failures(shared / "golden" / "text4vis", part) == []


def test_nothing_else_is_left_out(shared: Path) -> None:
    whole = {path.name for path in (shared / "golden" / "text4vis").iterdir()}
    assert whole - {path.name for path in COMMITTED.iterdir()} == NOT_COMMITTED
    recorded = Golden(shared / "golden" / "text4vis")
    for name in set().union(*CUT_DOWN.values()):
        ours, every = Golden(COMMITTED).arrays(name), recorded.arrays(name)
        assert ours.keys() < every.keys()
        assert all(np.array_equal(array, every[key]) for key, array in ours.items())
    assert len(RESNET) == 4 and len(PARTS) == 2 * len(cases(Golden(COMMITTED))) + len(
        text4vis.PARTS
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the committed folder that a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(COMMITTED, folder)
    folder.chmod(0o755)
    return folder


def change(path: Path, edit: Callable[[dict], None]) -> None:
    """Rewrites an .npz, .json or .safetensors file after `edit` of its contents."""
    path.chmod(0o644)
    if path.suffix == ".npz":
        content = dict(np.load(path))
        edit(content)
        np.savez(path, **content)
    elif path.suffix == ".json":
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
    else:
        content = load_file(path)
        edit(content)
        save_file(content, path)


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The suite made of these parts alone."""
    monkeypatch.setattr(text4vis, "parts", lambda golden: {name: PARTS[name] for name in names})


def test_a_difference_is_exit_status_1(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, "sampler", "map_multilabel")
    command = ["parity", "text4vis", str(copy), "--json"]
    assert main(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True and len(document["checks"]) > 50

    change(copy / "sampler.npz", lambda arrays: arrays["val_uniform/T4"].__setitem__((3, 1), 9))
    change(copy / "map_multilabel.npz", lambda arrays: arrays.update(mAP=arrays["mAP"] + 1e-4))
    assert main(command) == 1
    document = json.loads(capsys.readouterr().out)
    wrong = [check["check"] for check in document["checks"] if not check["passed"]]
    assert wrong == ["sampler/val_uniform/T4", "map_multilabel/mAP"]
    assert document["passed"] is False
    assert main(command[:-1]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("FAIL" in line for line in lines) == 2 and "checks passed" in lines[-1]


@pytest.mark.parametrize(
    ("part", "file", "key", "name"),
    [
        ("vit_tsm", "case_vit_tsm.safetensors", "logits_Transf", "vit_tsm/logits_Transf"),
        ("multiview", "case_multiview.safetensors", "T4_1x1/softmax", "multiview/T4_1x1/softmax"),
        ("bike", "case_bike.safetensors", "logits_None_VCS", "bike/logits_None_VCS"),
        ("header", "case_fusion_only.safetensors", "y_small_pos_zero", "header/y_small_pos_zero"),
    ],
)
def test_every_tensor_counts(copy: Path, part: str, file: str, key: str, name: str) -> None:
    metadata = {}
    if part == "vit_tsm":  # which save_file would lose
        metadata = Golden(copy).metadata("case_vit_tsm")
    tensors = load_file(copy / file)
    tensors[key] = tensors[key] + 2e-4
    (copy / file).chmod(0o644)
    save_file(tensors, copy / file, metadata)
    assert failures(copy, part) == [name]


def test_missing_and_damaged_files_are_named(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, "text", "map")
    for name in ("case_text.safetensors", "map.npz"):
        path = copy / name
        content = path.read_bytes()
        path.unlink()
        assert main(["parity", "text4vis", str(copy)]) == 2
        assert capsys.readouterr().err == f"error: {path}: missing from the recorded outputs\n"
        path.write_bytes(content[: len(content) // 2])
        assert main(["parity", "text4vis", str(copy)]) == 1
        assert f"{path}: damaged" in capsys.readouterr().out
        path.write_bytes(content)


def test_half_precision_keeps_every_prediction(tmp_path: Path) -> None:
    golden = Golden(COMMITTED)
    recorded = golden.tensors("case_multiview")
    write_frames(golden, tmp_path)
    for name, run in golden.json("case_multiview")["views"].items():
        found = evaluate_run(golden, tmp_path, run, precision="bf16")
        expected = recorded[f"{name}/view_embeddings"]
        cosines = torch.cosine_similarity(found.embeddings.float(), expected, dim=-1)
        assert cosines.min() > 0.999, name
        best = recorded[f"{name}/softmax"].argmax(dim=1)
        assert torch.equal(found.scores.argmax(dim=1), best), name
        assert not torch.equal(found.embeddings.float(), expected)  # it did run in bf16


SIZES = {"W": 64, "L": 1, "P": 4, "res": 12, "E": 32, "TW": 64, "TL": 1, "ctx": 20, "V": 40, "T": 3}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder of the same grammar and other sizes, by formulas written out once more."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "model_config.json").write_text(json.dumps({**SIZES, "B": 3, "C": 7}))
    log = {"sampler_seed_base": 5, "sampler_errors": {"test_dense/T6/clips1": ""}}
    counts = np.array([1, 5, 6, 7, 40, 129, 300])
    naive = [[int(i * (n / 6)) % n + 1 for i in range(6)] for n in counts.tolist()]
    dense = [
        [(k * (max(0, n - 128) // 4) + i * 21) % n + 1 for k in range(5) for i in range(6)]
        for n in counts.tolist()
    ]
    samples: dict[str, Any] = {
        "n_frames": counts,
        "val_uniform/T6": naive,
        "test_dense/T6/clips5": dense,
    }
    np.savez(folder / "sampler.npz", **samples)
    rng = np.random.default_rng(0)
    scores, targets = rng.random((31, 4)), rng.integers(2, size=(31, 4))
    each = [average_precision_score(targets[:, c], scores[:, c]) for c in range(4)]
    np.savez(
        folder / "map_multilabel.npz", scores=scores, targets=targets, ap=each, mAP=np.mean(each)
    )
    _zero_shot(folder, rng, log)
    (folder / "misc_log.json").write_text(json.dumps(log))
    return folder


def _zero_shot(folder: Path, rng: np.random.Generator, log: dict) -> None:
    """Nine classes, 80 videos, three halves, each ranked in the plainest way."""
    videos, rows, labels = (
        rng.normal(size=(80, 5)),
        rng.normal(size=(9, 5)),
        rng.integers(9, size=80),
    )

    def accuracy(chosen: list[int], k: int) -> float:
        kept = [n for n in range(80) if labels[n] in chosen]
        present = sorted({int(labels[n]) for n in kept})
        hits = 0
        for n in kept:
            order = sorted(present, key=lambda c: -float(videos[n] @ rows[c]))
            hits += int(labels[n]) in order[:k]
        return 100 * hits / len(kept)

    found: dict[str, Any] = {"video_features": videos, "text_features": rows, "labels": labels}
    every = list(range(9))
    halves = [np.random.RandomState(s).permutation(9)[:4] for s in range(3)]
    found |= {f"split{s}_classes": half for s, half in enumerate(halves)}
    for k in (1, 5):
        values = [accuracy(half.tolist(), k) for half in halves]
        found |= {
            f"full_top{k}": accuracy(every, k),
            f"split_top{k}": values,
            f"mean_top{k}": np.mean(values),
            f"std_top{k}": np.std(values),
        }
    np.savez(folder / "zeroshot.npz", **found)
    log["zeroshot_stdout"] = (
        f"Overall Top1 {found['full_top1']:.3f}% Top5 {found['full_top5']:.3f}%\n"
    )


@pytest.mark.parametrize("part", ["sampler", "map_multilabel", "zeroshot"])
def test_other_sizes_of_samplers_and_metrics(
    other: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    check = text4vis.PARTS[part]
    assert [found for found in check(Golden(other)) if not found.passed] == []


def test_other_sizes_of_models(other: Path, tmp_path: Path) -> None:
    """Recorded by the engine from open_clip's weights: what is proved is that sizes are read."""
    golden = Golden(other)
    torch.manual_seed(1)
    from kineticlip.models.temporal import TemporalTransformer
    from kineticlip.models.vision import VisionTransformer

    shape = golden.vit.vision
    assert isinstance(shape, VisionShape)
    tower = VisionTransformer(shape).eval()
    state = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    header = TemporalTransformer(golden.vit.embed, golden.vit.header_heads).eval()
    fusion = {f"fusion_model.{name}": tensor for name, tensor in header.state_dict().items()}
    text = text_tower(golden.text, None)
    state |= {**text.state_dict(), "logit_scale": torch.tensor(3.0)}
    save_file(state, other / "clip_vit_base.safetensors")
    save_file(fusion, other / "fusion_transf.safetensors")
    tokens = torch.randint(1, 38, (7, 20))
    tokens[:, 9] = 39
    frames = torch.randint(0, 256, (9, 3, 12, 12), dtype=torch.uint8)
    with torch.inference_mode():
        features = encode_text(text, tokens).clone()
        rows = tower(frames)
        means = {"None": rows.unflatten(0, (3, 3)).mean(1)}
        means["Transf"] = header(rows.unflatten(0, (3, 3))).mean(1)
        recorded = {"frame_embeddings": rows}
        for name, videos in means.items():
            unit = torch.nn.functional.normalize(videos, dim=-1)
            logits = np.exp(3.0) * unit @ torch.nn.functional.normalize(features, dim=-1).T
            recorded |= {f"video_embedding_{name}": videos, f"logits_{name}": logits}
    save_file({"tokens": tokens.int(), "text_features": features}, other / "case_text.safetensors")
    save_file({"frames_vit": frames}, other / "frames_vit.safetensors")
    metadata = {"tm": "False", "joint_st": "False", "T": "3", "base": "clip_vit_base", "batch": "3"}
    save_file(
        {k: t.clone() for k, t in recorded.items()}, other / "case_vit_odd.safetensors", metadata
    )
    visual = {k: t for k, t in state.items() if k.startswith("visual.") or k == "logit_scale"}
    keys = {
        "vit_odd": [[name, list(tensor.shape)] for name, tensor in visual.items()],
        "fusion_model (sim_header Transf adds)": [[k, list(t.shape)] for k, t in fusion.items()],
    }
    (other / "checkpoint_keys.json").write_text(json.dumps(keys))
    for part in ("vit_odd", "checkpoint/vit_odd", "text"):
        assert failures(other, part) == []


def test_a_number_of_epochs_between_decays() -> None:
    solver = {"type": "multistep", "lr_decay_step": 5}
    assert schedule_of(solver, 12, 1)["milestones"] == (5, 10)
