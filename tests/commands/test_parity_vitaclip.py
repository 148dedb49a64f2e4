"""The recorded outputs of the official Vita-CLIP code, and that the replay can fail."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kineticlip.commands.parity.suites import Check, replay
from kineticlip.runtime.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "vitaclip"


def failures(folder: Path) -> list[str]:
    return [
        f"{c.name}: {c.error:.2e} {c.detail}" for c in replay("vitaclip", folder) if not c.passed
    ]


def test_committed_outputs() -> None:
    found = list(replay("vitaclip", GOLDEN))
    assert [check.name for check in found if not check.passed] == []
    kinds = {check.name.split()[0] for check in found}
    assert kinds == {
        "tokens", "text", "vision", "trace", "frames", "zero-shot", "gradients", "AdamW", "main",
        "data", "layout",
    }  # fmt: skip
    assert len(found) > 200


def test_all_outputs(shared: Path) -> None:
    assert failures(shared / "golden" / "vitaclip") == []


def first_failure(checks: Iterator[Check]) -> Check:
    return next(check for check in checks if not check.passed)


def test_a_changed_weight_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN, folder)
    weights = load_file(folder / "weights.safetensors")
    weights["visual.time_embed"] = weights["visual.time_embed"].roll(1, dims=0)
    save_file(weights, folder / "weights.safetensors")
    found = first_failure(replay("vitaclip", folder))
    assert found.name.startswith("text csc_end logits") and found.error > 100 * found.tolerance


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN, folder)
    (folder / "text_variants.safetensors").unlink()
    with pytest.raises(UserError, match=r"text_variants\.safetensors: missing"):
        list(replay("vitaclip", folder))


def test_a_weight_that_is_not_a_number_fails() -> None:
    from kineticlip.commands.parity.suites import compare

    assert not compare("x", torch.tensor([float("nan")]), torch.ones(1), atol=1.0).passed
