"""Speeds as records: as the files have them, and those of several processes as one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kineticlip.evaluation.speed import (
    Agreement,
    Performance,
    Speed,
    combined,
    combined_agreement,
    combined_speed,
)
from kineticlip.runtime.errors import UserError
from made_results import SPEED

ONE = replace(
    SPEED, seconds=10.0, videos_per_second=1.0, views_per_second=3.0, images_per_second=8.0,
    videos=10, images=80, chunk=16, chunk_halvings=1, model_images_per_second=10.0,
    percent_of_model_speed=80.0, decode_percent=20.0,
)  # fmt: skip


def test_speeds_add_up() -> None:
    both = combined_speed([ONE, replace(ONE, seconds=20.0, decode_percent=40.0)])
    assert both.videos == 20 and both.videos_per_second == 1.0 and both.processes == 2
    assert both.views_per_second == 4.5 and both.decode_percent == 30.0
    assert both.chunk_halvings == 2 and both.chunk == 16
    assert both.percent_of_model_speed == pytest.approx(40.0)
    untimed = replace(ONE, model_images_per_second=None, percent_of_model_speed=None)
    assert combined_speed([ONE, untimed]).model_images_per_second is None
    idle = replace(untimed, videos=0, images=0)
    assert combined_speed([ONE, idle]).percent_of_model_speed == pytest.approx(80.0)


def test_what_8_bits_cost_is_that_of_all_processes() -> None:
    """Once it was the first process's alone."""
    shares = [
        Agreement(videos=4, top1_agreement=100.0, top5_agreement=75.0, score_difference=0.01),
        Agreement(videos=1, top1_agreement=0.0, top5_agreement=100.0, score_difference=0.3),
        Agreement(videos=0, top1_agreement=100.0, top5_agreement=100.0, score_difference=0.0),
    ]
    found = combined([Performance(speed=ONE, agreement=share) for share in shares])
    assert found is not None and found.agreement is not None
    assert found.agreement == Agreement(
        videos=5, top1_agreement=80.0, top5_agreement=80.0, score_difference=0.3
    )
    assert combined_agreement(shares[2:]) == shares[2]
    plain = combined([Performance(speed=ONE), Performance(speed=ONE)])
    assert plain is not None and plain.agreement is None
    assert combined([]) is None


def test_records_come_back_from_json() -> None:
    for speed in (ONE, combined_speed([ONE, ONE])):
        again = Speed.from_json(json.loads(json.dumps(speed.to_json())), "file")
        assert again == speed
    assert "processes" not in ONE.to_json()  # summaries of one process have never had it
    agreement = Agreement(
        videos=4, top1_agreement=100.0, top5_agreement=75.0, score_difference=0.01
    )
    for found in (Performance(speed=ONE), Performance(speed=ONE, agreement=agreement)):
        assert Performance.from_json(json.loads(json.dumps(found.to_json())), "file") == found


def test_a_speed_of_another_version_is_named() -> None:
    values = ONE.to_json()
    with pytest.raises(UserError, match=r"s\.json: 'gpu' is unknown in the speed of a run"):
        Speed.from_json({**values, "gpu": 1}, "s.json")
    del values["chunk"]
    with pytest.raises(UserError, match=r"s\.json: 'chunk' is missing in the speed of a run"):
        Speed.from_json(values, "s.json")
