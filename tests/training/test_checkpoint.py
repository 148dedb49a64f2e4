"""The commit protocol, what resuming refuses, and the weights that a run hands on."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kineticlip.config import Config, DataConfig, OptimConfig, TrainConfig
from kineticlip.formats.trained import export_weights, load_weights
from kineticlip.runtime.distributed import Ranks
from kineticlip.runtime.errors import UserError
from kineticlip.training import checkpoint as checkpoints
from kineticlip.training.checkpoint import (
    Progress,
    commit,
    committed,
    find_resumable,
    read_manifest,
)

ALONE = Ranks()
CONFIG = Config(data=DataConfig(train_list="train.txt"))


class Killed(BaseException):
    """What happens between two lines of the program when it is killed there."""


def save(folder: Path, tag: str) -> None:
    """As DeepSpeed does: the shards of a tag, each rank its own."""
    (folder / tag).mkdir(exist_ok=True)
    (folder / tag / "model_states.pt").write_bytes(b"model" * 1000)
    (folder / tag / "optim_states.pt").write_bytes(b"optim" * 2000)


def write(
    output: Path, step: int, *, config: Config = CONFIG, ranks: Ranks = ALONE, keep: int = 2
) -> Path:
    progress = Progress(step=step, position=4 * step, epoch_length=16)
    folder = output / "checkpoints"
    return commit(folder, save, progress=progress, config=config, ranks=ranks, keep=keep)


def find(output: Path, resume: str = "auto", config: Config = CONFIG) -> Path | None:
    return find_resumable(resume, output, config, ALONE)


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def test_a_commit_is_named_sealed_and_the_last_n_stay(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        write(tmp_path, step)
    assert names(tmp_path) == ["latest", "step-00000006", "step-00000009"]
    newest = tmp_path / "checkpoints" / "step-00000009"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000009\n"
    assert find(tmp_path) == newest
    manifest = read_manifest(newest)
    assert Progress(**manifest.progress) == Progress(step=9, position=36, epoch_length=16)
    assert manifest.world_size == 1
    assert manifest.files["optim_states.pt"][0] == 10_000
    assert manifest.files.keys() == {"model_states.pt", "optim_states.pt", "rank-00000.pt"}
    assert manifest.versions.keys() == {"kineticlip", "torch", "deepspeed"}


# A call inside `commit` -> what the next start finds if the process dies there.
DEATHS = {
    "save": (__name__, "save", 6),
    "sealing": (checkpoints, "_seal", 6),
    "syncing a file": (checkpoints, "sync", 6),
    "writing the manifest": (checkpoints, "write_atomic", 6),
    "the rename": (checkpoints, "move", 6),
    "deleting the old ones": (checkpoints, "rmtree", 9),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str
) -> None:
    write(tmp_path, 3, keep=1)
    write(tmp_path, 6, keep=1)
    owner, name, survivor = DEATHS[death]

    def killed(*args: object, **options: object) -> None:
        if death == "save":
            folder, tag = args
            assert isinstance(folder, Path)
            (folder / str(tag)).mkdir()
            (folder / str(tag) / "model_states.pt").write_bytes(b"mod")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[owner] if isinstance(owner, str) else owner, name, killed)
        with pytest.raises(Killed):
            write(tmp_path, 9, keep=1)
    found = find(tmp_path)
    assert found is not None
    assert found.name == f"step-0000000{survivor}"
    assert read_manifest(found).progress["step"] == survivor
    write(tmp_path, 12, keep=1)  # and the leftovers of the kill are gone
    assert names(tmp_path) == ["latest", "step-00000012"]


def damage(path: Path, how: str) -> None:
    shard = path / "optim_states.pt"
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif how == "flipped":
        data = bytearray(shard.read_bytes())
        data[77] ^= 1
        shard.write_bytes(data)
    elif how == "shard gone":
        shard.unlink()
    elif how == "manifest gone":
        (path / "MANIFEST.json").unlink()
    else:
        (path / "MANIFEST.json").write_text("{" if how == "manifest torn" else "{}")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"damaged: optim_states.pt has 9999 bytes, not 10000; move it away"),
        ("flipped", r"damaged: optim_states.pt was changed"),
        ("shard gone", r"damaged: optim_states.pt is missing"),
        ("manifest gone", r"no checkpoint: it has no MANIFEST.json"),
        ("manifest torn", r"damaged: MANIFEST.json cannot be read"),
        ("manifest empty", r"damaged: MANIFEST.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, how: str, message: str) -> None:
    """Neither the one before it nor a start from scratch takes its place in silence."""
    write(tmp_path, 3)
    newest = write(tmp_path, 6)
    damage(newest, how)
    with pytest.raises(UserError, match=rf"step-00000006: {message}"):
        find(tmp_path)
    newest.rename(tmp_path / "elsewhere")
    assert find(tmp_path) == tmp_path / "checkpoints" / "step-00000003"


def test_a_run_whose_checkpoints_vanished_does_not_start_over(tmp_path: Path) -> None:
    write(tmp_path, 3).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="names a latest checkpoint but holds none"):
        find(tmp_path)


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 3)
    changed = replace(CONFIG, optim=OptimConfig(lr=1e-3), seed=5)
    with pytest.raises(
        UserError, match=r"another config: optim.lr is 5e-05 there and 0.001 here; seed is 1024"
    ):
        find(tmp_path, config=changed)
    with pytest.raises(UserError, match="written by 1 processes, this run has 2"):
        find_resumable("auto", tmp_path, CONFIG, Ranks(world_size=2))


def test_what_does_not_change_the_training_may_change(tmp_path: Path) -> None:
    write(tmp_path, 3)
    train = TrainConfig(checkpoint_every=7, keep_checkpoints=5, eval_every=0.5, log_every=3)
    data = DataConfig(train_list="train.txt", val_list="val.txt", workers=9)
    again = replace(CONFIG, name="again", output=str(tmp_path), train=train, data=data)
    assert find(tmp_path, config=again) is not None


def test_never_and_a_path(tmp_path: Path) -> None:
    assert find(tmp_path / "new", "never") is None
    old = write(tmp_path / "old", 3)
    newest = write(tmp_path / "old", 6)
    with pytest.raises(UserError, match="already holds a run"):
        find(tmp_path / "old", "never")
    for path in (newest, newest.parent, tmp_path / "old"):
        assert find(tmp_path / "new", str(path)) == newest
    assert find(tmp_path / "new", str(old)) == old
    with pytest.raises(UserError, match="holds step-00000006, newer than"):
        find(tmp_path / "old", str(old))
    with pytest.raises(UserError, match="neither a checkpoint nor a run that has one"):
        find(tmp_path / "new", str(tmp_path / "nothing"))


def test_nodes_that_share_no_folder_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rank-00001.pt of other processes are missing"):
        write(tmp_path, 3, ranks=Ranks(world_size=2))
    assert committed(tmp_path / "checkpoints") == []


def test_the_random_state_comes_back_without_pickled_objects(tmp_path: Path) -> None:
    def draw() -> tuple[float, list[float], list[float]]:
        return random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist()

    np.random.randn(1)  # leaves a second Gaussian behind, which is state too
    torch.save(checkpoints.random_state(), tmp_path / "state.pt")
    expected = draw()
    draw()
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    checkpoints.restore_random_state(loaded)
    assert draw() == expected


def test_exported_weights_say_what_they_are(tmp_path: Path) -> None:
    tensors = {"logit_scale": torch.tensor(4.6), "visual.proj": torch.randn(4, 3).T}
    export_weights(
        tmp_path / "weights.safetensors",
        tensors,
        config=CONFIG,
        class_names=["riding a bike", "na\u00efve 'quote'"],
        step=7,
        classifier={"source": "text", "rows": 2},
    )
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o644
    loaded = load_weights(tmp_path / "weights.safetensors")
    assert loaded.class_names == ("riding a bike", "na\u00efve 'quote'")
    assert (loaded.step, loaded.classifier) == (7, {"source": "text", "rows": 2})
    assert loaded.config["data"]["train_list"] == "train.txt"
    assert loaded.tensors.keys() == tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "kineticlip"
        assert json.loads(file.metadata()["step"]) == 7


def test_weights_of_other_code_bases_and_damaged_files(tmp_path: Path) -> None:
    official = {"visual.conv1.weight": torch.zeros(4, 3, 2, 2), "logit_scale": torch.tensor(1.0)}
    export_weights(
        tmp_path / "w.safetensors", official, config=CONFIG, class_names=[], step=0, classifier={}
    )
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"torn.safetensors"):
        load_weights(tmp_path / "torn.safetensors")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_weights(tmp_path / "absent.safetensors")
