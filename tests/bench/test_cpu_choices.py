"""The CPU's choices: what is timed against each other computes the same."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import cpu_choices
from cpu_choices import Choice


def test_rivals_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_choices, "ROWS_B", 80)
    monkeypatch.setattr(cpu_choices, "ROWS_L", 70)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compared = 0
    with torch.inference_mode():
        for choice in cpu_choices.choices():
            here, there = choice.engine(), choice.other()
            if choice.what == "int8 product alone":  # without the scales of its rows
                continue
            if isinstance(here, tuple):
                # the last bit of a scale moves a value that lies between two bytes
                assert (here[0].int() - there[0].int()).abs().max() <= 1
                torch.testing.assert_close(here[1], there[1])
            else:
                difference = (here - there).float().norm() / there.float().norm()
                assert difference < (0.02 if "int8" in choice.what else 0.01), choice
            compared += 1
    assert compared >= 10


def test_the_ratio_is_the_rivals_time_over_the_engines() -> None:
    quick, slow = (lambda: time.sleep(0.002)), (lambda: time.sleep(0.006))
    row = cpu_choices.measure(Choice("what", "1", "other", quick, slow), rounds=3)
    assert 1.5 < row["ratio"] < 4 and row["range"][0] <= row["ratio"] <= row["range"][1]
    back = cpu_choices.measure(Choice("what", "1", "other", slow, quick), rounds=3)
    assert back["ratio"] < 0.7
