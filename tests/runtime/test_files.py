"""Files and folders appear whole or not at all, with the permissions that open() would give."""

from __future__ import annotations

import ast
import os
import resource
import stat
from pathlib import Path

import pytest
import torch

from kineticlip.formats.files import write_safetensors, write_torch
from kineticlip.models.classifier import Classifier, save_classifier
from kineticlip.runtime import files
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_atomic, write_whole

ENGINE = Path(__file__).parents[2] / "engine"


class Killed(Exception):
    pass


def test_bytes_replace_a_file_and_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.bin"
    write_atomic(path, b"one")
    write_atomic(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["b.bin"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_open_whatever_wrote_the_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)}, {})
        write_torch(tmp_path / "x.pt", {"a": torch.zeros(2)})
        save_classifier(
            Classifier(torch.zeros(1, 2), ("a",), {}), tmp_path / "classifier.safetensors"
        )
        write_atomic(tmp_path / "x.bin", b"")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 4
    assert set(modes.values()) == {0o666 & ~umask}


def test_an_exception_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"earlier")
    with pytest.raises(Killed), write_whole(path) as part:
        assert part.name == path.name  # muxers look at the suffix
        part.write_bytes(b"half")
        raise Killed
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_the_earlier_folder(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    for names in (["a", "b"], ["c"]):
        with write_whole(path) as part:
            (part / "inner").mkdir(parents=True)
            for name in names:
                (part / "inner" / name).write_text(name)
    assert [file.name for file in (path / "inner").iterdir()] == ["c"]
    assert list(tmp_path.iterdir()) == [path]


def test_everything_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, move = files.sync, files.move

    def watched_sync(path: Path) -> None:
        events.append(path.name)
        sync(path)

    def watched_move(part: Path, path: Path) -> None:
        events.append("->")
        move(part, path)

    monkeypatch.setattr(files, "sync", watched_sync)
    monkeypatch.setattr(files, "move", watched_move)
    write_atomic(tmp_path / "x", b"data")
    assert events == ["x", "->", tmp_path.name]
    events.clear()
    with write_whole(tmp_path / "folder") as part:
        part.mkdir()
        (part / "1.jpg").touch()
        (part / "2.jpg").touch()
    assert sorted(events[:3]) == ["1.jpg", "2.jpg", "folder"]
    assert events[3:] == ["->", tmp_path.name]


@pytest.mark.parametrize("kind", ["bytes", "safetensors", "torch", "classifier"])
def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    tensor = torch.zeros(1000, 10)
    writers = {
        "bytes": lambda: write_atomic(path, bytes(40_000)),
        "safetensors": lambda: write_safetensors(path, {"a": tensor}, {}),
        "torch": lambda: write_torch(path, {"a": tensor}),
        "classifier": lambda: save_classifier(
            Classifier(tensor, tuple(map(str, range(1000))), {}), path
        ),
    }
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UserError) as error:
            writers[kind]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value).startswith(f"{path}: cannot be written: ")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/x: cannot be written: "):
        write_atomic(tmp_path / "file" / "x", b"")


def test_torch_files_do_not_depend_on_the_temporary_name(tmp_path: Path) -> None:
    write_torch(tmp_path / "x.pt", {"a": torch.ones(3)})
    first = (tmp_path / "x.pt").read_bytes()
    write_torch(tmp_path / "x.pt", {"a": torch.ones(3)})
    assert (tmp_path / "x.pt").read_bytes() == first


def test_nobody_else_syncs_and_renames_files() -> None:
    """One writer: runtime/files.py; the journal syncs what it appends to."""
    found = set()
    for path in ENGINE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                if node.attr in ("fsync", "mkstemp", "NamedTemporaryFile") or (
                    owner == "os" and node.attr in ("replace", "rename")
                ):
                    found.add(path.relative_to(ENGINE / "kineticlip").as_posix())
    assert found == {"runtime/files.py", "runtime/journal.py"}
