"""The record of the machine, and the clock of repeated calls."""

from __future__ import annotations

import json

import pytest
import torch

from kineticlip.runtime.machine import machine_record, software_record, time_calls


def test_records_are_plain_and_complete() -> None:
    machine, software = machine_record(), software_record()
    assert json.loads(json.dumps([machine, software])) == [machine, software]
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0.5
    assert software["torch"] is not None and software["deepspeed"] is not None
    assert (software["commit"] is None) == (software["dirty"] is None)
    assert software["commit"] is None or len(software["commit"]) == 40


def test_time_calls_counts_milliseconds_and_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that says what each call took; a GPU's events are another clock."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clock = [0.0]
    calls: list[None] = []
    seconds = iter((9, 9, 0.002, 0.003, 0.001, 0.005, 0.004))  # two calls warm up

    def call() -> None:
        calls.append(None)
        clock[0] += next(seconds)

    monkeypatch.setattr("kineticlip.runtime.machine.time.perf_counter", lambda: clock[0])
    timing = time_calls(call, warmup=2, repeats=5)
    monkeypatch.undo()
    assert len(calls) == 7 and timing.calls == 5
    found = (timing.least, timing.p20, timing.p50, timing.p80)
    assert found == pytest.approx((1.0, 2.0, 3.0, 5.0))
    with pytest.raises(ValueError, match="at least 1"):
        time_calls(call, repeats=0)
