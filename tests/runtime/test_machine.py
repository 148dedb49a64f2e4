"""The record of the machine, and the clock of repeated calls."""

from __future__ import annotations

import json
import time

import pytest

from kineticlip.runtime.machine import machine_record, software_record, time_calls


def test_records_are_plain_and_complete() -> None:
    machine, software = machine_record(), software_record()
    assert json.loads(json.dumps([machine, software])) == [machine, software]
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0.5
    assert software["torch"] is not None and software["deepspeed"] is not None
    assert (software["commit"] is None) == (software["dirty"] is None)
    assert software["commit"] is None or len(software["commit"]) == 40


def test_time_calls_counts_milliseconds_and_calls() -> None:
    calls = []

    def call() -> None:
        calls.append(time.sleep(0.002))

    timing = time_calls(call, warmup=2, repeats=5)
    assert len(calls) == 7
    assert timing.calls == 5
    assert 2.0 <= timing.p20 <= timing.p50 <= timing.p80 < 500
    with pytest.raises(ValueError, match="at least 1"):
        time_calls(call, repeats=0)
