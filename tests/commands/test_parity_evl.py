"""The official EVL code's recorded outputs, replayed; and that the replay notices a difference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kineticlip.__main__ import main
from kineticlip.commands.parity.suites import replay
from kineticlip.runtime.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "evl"


def failures(folder: Path) -> list[str]:
    return [
        f"{check.name}: {check.error} > {check.tolerance} {check.detail}"
        for check in replay("evl", folder)
        if not check.passed
    ]


def test_every_recorded_output_is_reproduced() -> None:
    checks = list(replay("evl", GOLDEN))
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) > 900


def test_other_sizes_are_reproduced_too(shared: Path) -> None:
    """A square model with another width, depth and number of frames, all eight variants of it."""
    assert failures(shared / "golden" / "evl") == []


def test_a_wrong_number_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "evl"
    shutil.copytree(GOLDEN, copy)
    recorded = load_file(copy / "rect" / "io.safetensors")
    recorded["query.1"] = recorded["query.1"] * 1.0001
    save_file(recorded, copy / "rect" / "io.safetensors")
    rates = json.loads((copy / "lr.json").read_text())
    rates["lr_used_at_step"][3] *= 1 + 1e-9
    (copy / "lr.json").write_text(json.dumps(rates))
    names = [line.split(":")[0] + line.split(":")[1] for line in failures(copy)]
    assert names == ["rect io query.1", "lr used"]


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "evl"
    shutil.copytree(GOLDEN, copy)
    (copy / "eval.safetensors").unlink()
    with pytest.raises(UserError, match=r"eval.safetensors: missing from the recorded outputs"):
        failures(copy)
    assert main(["parity", "evl", str(copy)]) == 2
    assert "eval.safetensors" in capsys.readouterr().err


def test_what_the_engine_has_no_form_for_fails_by_name_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "evl"
    shutil.copytree(GOLDEN, copy)
    sizes = json.loads((copy / "rect" / "config.json").read_text())
    sizes["patch_size"] = [8, 16]
    (copy / "rect" / "config.json").write_text(json.dumps(sizes))
    record = json.loads((copy / "checkpoint_mini.json").read_text())
    del record["lr_sched"]
    (copy / "checkpoint_mini.json").write_text(json.dumps(record))
    assert main(["parity", "evl", str(copy)]) == 1
    lines = capsys.readouterr().out.splitlines()
    rect = next(line for line in lines if line.startswith("rect: replayed "))
    assert rect.endswith("FAIL  patches of 8 x 16: the engine's are square")
    last = next(line for line in lines if line.startswith("checkpoint: replayed "))
    assert "FAIL  KeyError: 'lr_sched' (files.py:" in last
    assert any(line.startswith("lr: used ") for line in lines)
