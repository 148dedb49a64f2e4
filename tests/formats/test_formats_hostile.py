"""Checkpoints from strangers: nothing is executed, nothing damaged is believed."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kineticlip.formats import read_checkpoint
from kineticlip.runtime.errors import UserError

Open = Callable[[str], Path]


class _Touch:
    """Unpickling this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


class _Shell:
    """Unpickling this runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("exit 1",))


def test_objects_in_a_pickle_are_refused_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "run"
    for name, zipped in (("zip.pt", True), ("legacy.pt", False)):
        path = tmp_path / name
        torch.save({"state_dict": _Touch(trap)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="Python objects, which are never loaded"):
            read_checkpoint(path)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        (tmp_path / "bare.pkl").write_bytes(pickle.dumps(_Touch(trap), protocol=protocol))
        with pytest.raises(UserError, match="Python objects, which are never loaded"):
            read_checkpoint(tmp_path / "bare.pkl")
    torch.save({"x": _Shell()}, tmp_path / "shell.pt")
    with pytest.raises(UserError, match=r"Python objects, which are never loaded \(.*\.system"):
        read_checkpoint(tmp_path / "shell.pt")
    assert not trap.exists()


def test_a_hostile_torchscript_archive_is_refused_not_run(sample: Open, tmp_path: Path) -> None:
    trap = tmp_path / "run"
    for payload, message in (
        (pickle.dumps(_Touch(trap), protocol=2), "refused to load '"),
        (b"\x80\x02c__torch__\nX\n)\x81K\x05b.", "a module state that is not a dictionary"),
        (b"not a pickle", "TorchScript archive"),
    ):
        path = tmp_path / "evil.pt"
        with zipfile.ZipFile(sample("openai_jit")) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                evil = entry.filename.endswith("/data.pkl")
                new.writestr(entry, payload if evil else old.read(entry))
        with pytest.raises(UserError, match=message):
            read_checkpoint(path)
    assert not trap.exists()


def test_a_torchscript_storage_shorter_than_declared_is_refused(
    sample: Open, tmp_path: Path
) -> None:
    path = tmp_path / "short.pt"
    with zipfile.ZipFile(sample("openai_jit")) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            short = "/data/" in entry.filename and len(data) > 100
            new.writestr(entry.filename, data[:-64] if short else data)
    with pytest.raises(UserError, match="shorter than declared"):
        read_checkpoint(path)


def test_compressed_torchscript_records_are_refused(sample: Open, tmp_path: Path) -> None:
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(sample("openai_jit")) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"data\.pkl is compressed"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["openai_jit", "openai_state", "openai_safetensors", "evl"])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.4, 0.999])
def test_truncated_files_are_user_errors(
    sample: Open, tmp_path: Path, name: str, fraction: float
) -> None:
    whole = sample(name).read_bytes()
    path = tmp_path / f"cut{sample(name).suffix}"
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(UserError, match=str(path)):
        read_checkpoint(path)


def test_foreign_files_are_user_errors(tmp_path: Path) -> None:
    for name, data in (
        ("page.pt", b"<html>404</html>"),
        ("page.safetensors", b"<html>404</html>"),
        ("table.pth", b"a,b\n1,2\n"),
        ("noise.bin", bytes(range(256)) * 9),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"other\.zip"):
        read_checkpoint(tmp_path / "other.zip")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="expected a dictionary of tensors, found list"):
        read_checkpoint(tmp_path / "list.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(tmp_path)
