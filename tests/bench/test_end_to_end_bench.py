"""The end-to-end benchmark: its arithmetic, its options, and one run of it on tiny work."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import end_to_end  # noqa: E402
import limits  # noqa: E402
from kineticlip.commands.demo.clips import render_clip, write_clip  # noqa: E402
from limits import Limits, product_rates  # noqa: E402


def test_ceilings_are_the_time_of_the_products_alone() -> None:
    found = Limits("ViT-B-16", 224, naive_images=96)
    for rates in ({"fp32": 100.0, "bf16": 150.0, "int8": 400.0}, {"fp32": 90.0, "bf16": 200.0}):
        found.add(rates)
    record = found.record(45.0, engine_images=48)
    assert record["gflops"] == {"fp32": 100.0, "bf16": 200.0, "int8": 400.0}  # the best of all
    assert record["naive_gflop"] == pytest.approx(96 * 35.13, rel=0.01)  # 17.56 GMAC an image
    percent = record["naive_gflop"] / 100 / 45 * 100
    assert record["product_percent_of_naive"] == pytest.approx(percent, abs=0.1)
    ceiling = record["ceiling"]
    assert ceiling["bf16"] == pytest.approx(2 * ceiling["fp32"], rel=0.01)
    assert ceiling["bf16"] < ceiling["int8"] < 4 * ceiling["fp32"]  # attention is not int8
    assert ceiling["fp32"] == pytest.approx(45 / record["engine_gflop"] * 100, rel=0.01)


def test_products_are_timed_in_three_precisions() -> None:
    rates = product_rates((32, 128), torch.device("cpu"))
    assert rates.keys() == {"fp32", "bf16", "int8"} and min(rates.values()) > 0


def test_ratios_are_medians_of_rounds() -> None:
    truth = torch.eye(8)[:2].softmax(dim=-1)
    engine = [(truth + 1e-7, wall, 2 * wall) for wall in (1.0, 2.0, 4.0)]
    naive = [(truth, 8.0, 8.0)] * 3
    row = end_to_end.compared(engine, naive, truth)
    assert (row["ratio"], row["ratio_range"]) == (4.0, [2.0, 8.0])
    assert (row["cpu_ratio"], row["cpu_ratio_range"]) == (2.0, [1.0, 4.0])
    assert row["score_difference"] < 1e-5


def test_what_is_fast_but_wrong_is_said() -> None:
    good = {"work": "w", "engine": "fp32", "score_difference": 1e-6, "top5_equal": 2, "videos": 2}
    assert end_to_end.problems([good, {**good, "engine": "int8", "top5_equal": 1}]) == []
    wrong = [{**good, "score_difference": 1e-4}, {**good, "engine": "bf16", "top5_equal": 1}]
    assert end_to_end.problems(wrong) == [
        "w bf16: top-5 sets of 1 videos differ",
        "w fp32: scores differ by 1.0e-04",
    ]


def test_a_run_on_a_real_file_prints_one_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "a.mp4", render_clip(0, 0, np.random.default_rng(0)))
    work = end_to_end.Work("ViT-B-32", 224, 1, 3, 1)
    monkeypatch.setattr(end_to_end, "QUICK", (work,))
    monkeypatch.setattr(limits, "ROWS", 16)
    words = [str(tmp_path), "--quick", "--works", "0", "--engines", "fp32,bf16", "--rounds", "1"]
    results = tmp_path / "results"
    command = ["end_to_end.py", *words, "--baselines", "fp32", "--json", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", command)
    assert end_to_end.main() == 0
    record = json.loads(capsys.readouterr().out)
    assert record["machine"]["cpu"] and record["videos"] == ["a.mp4"]
    assert [(row["engine"], row["baseline"]) for row in record["rows"]] == [
        ("fp32", "fp32"),
        ("bf16", "fp32"),
    ]
    assert record["rows"][0]["score_difference"] < 1e-5
    assert all(row["ratio"] > 0 and row["top5_equal"] == 1 for row in record["rows"])
    (kept,) = results.glob("*-torch*/*-end-to-end.json")
    assert json.loads(kept.read_text()) == record
