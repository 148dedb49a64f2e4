"""Orientation from display matrices, by the definition of the matrix."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kineticlip.video import pictures
from kineticlip.video.pictures import Orientation, orientation_of, upright
from kineticlip.video.probe import TURNS


@pytest.fixture(autouse=True)
def made_up_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """The side data of frame_with, which no container holds."""
    monkeypatch.setattr(pictures, "SideDataContainer", lambda frame: frame.side_data)


def frame_with(a: float, b: float, c: float, d: float) -> SimpleNamespace:
    one = 1 << 16
    matrix = np.array([a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30], dtype=np.int32)
    return SimpleNamespace(side_data={"DISPLAYMATRIX": matrix.tobytes()})


MATRICES = [
    (a, b, c, d)
    for a, b, c, d in itertools.product((-1, 0, 1), repeat=4)
    if abs(a) + abs(b) == abs(c) + abs(d) == abs(a * d - b * c) == 1
]


@pytest.mark.parametrize("matrix", MATRICES)
def test_each_matrix_moves_every_pixel_where_it_says(matrix: tuple[int, int, int, int]) -> None:
    a, b, c, d = matrix
    stored = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(1, 2, 3, 3)  # 3 wide, 2 high
    places = {(a * x + c * y, b * x + d * y): stored[0, y, x] for x in range(3) for y in range(2)}
    left, top = (min(place[axis] for place in places) for axis in (0, 1))
    orientation = orientation_of(frame_with(a, b, c, d))
    shown = upright(stored, orientation)
    width, height = orientation.upright_size(3, 2)
    assert shown.shape == (1, height, width, 3)
    for (x, y), pixel in places.items():
        np.testing.assert_array_equal(shown[0, y - top, x - left], pixel)
    same = orientation.apply(torch.from_numpy(stored)).contiguous().numpy()
    np.testing.assert_array_equal(same, shown)


def test_there_are_eight_turns_and_each_has_a_name() -> None:
    found = {orientation_of(frame_with(*matrix)) for matrix in MATRICES}
    assert len(MATRICES) == len(found) == 8
    assert found == set(TURNS.values())
    assert orientation_of(SimpleNamespace(side_data={})) == TURNS[0, False] == Orientation()


def test_a_slanted_picture_goes_to_the_nearest_axis() -> None:
    cos, sin = np.cos(np.radians(80)), np.sin(np.radians(80))
    slanted = orientation_of(frame_with(cos, sin, -sin, cos))
    assert slanted == orientation_of(frame_with(0, 1, -1, 0))
