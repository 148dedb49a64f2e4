"""The decoding benchmark: a small run of it, and decoders that fail in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import decode


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(decode, "GROUPS", (12,))
    monkeypatch.setattr(decode, "COUNTS", (8,))
    return ["decode.py", "--sizes", "160x112", "--videos", "2", "--rounds", "2"]


@pytest.mark.needs_torchcodec
def test_every_decoder_has_a_row_against_sequential_reading(
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "argv", [*small, "--json", "--results", str(tmp_path)])
    assert decode.main() == 0
    record = json.loads(capsys.readouterr().out)
    names = [row["decoder"] for row in record["rows"]]
    assert names == ["sequential", "pyav cpu", "torchcodec cpu"]
    for row in record["rows"]:
        low, high = row["cpu_ratio_range"]
        assert 0 < low <= row["cpu_ratio"] <= high
        assert "videos_per_s" not in row  # absolute numbers are a GPU's
    assert record["rows"][0]["cpu_ratio_range"] == [1.0, 1.0]
    (kept,) = tmp_path.rglob("*-decode.json")
    assert json.loads(kept.read_text()) == record


def test_a_decoder_with_wrong_frames_or_none_is_named_and_not_timed(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = decode.runs

    def runs(path: Path, numbers: list[int], *rest: Any) -> Any:
        yield from honest(path, numbers, *rest)
        yield "off by one", lambda: [decode.sequential(path, [n - 1 for n in numbers])]
        yield "absent", "it is not here"

    monkeypatch.setattr(decode, "runs", runs)
    monkeypatch.setattr(sys, "argv", small)
    assert decode.main() == 1
    out = capsys.readouterr().out
    assert "off by one             returned frames [17, 55, 92" in out
    assert "absent                 it is not here" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="these decoders can be had")
def test_gpu_decoders_that_cannot_be_had_have_rows_that_say_so(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    decode.write_clip(path, 160, 112, 12)
    options: Any = SimpleNamespace(videos=1, threads=1, batch=1, device="cuda", rounds=1)
    rows = {row["decoder"]: row for row in decode.measure(path, [3], options)}
    assert rows["sequential"]["ratio"] == 1.0
    failed = {name.partition(",")[0] for name, row in rows.items() if row.get("error")}
    assert failed >= {"dali gpu", "torchcodec gpu"}
