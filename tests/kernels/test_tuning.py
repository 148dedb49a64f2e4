"""What tuning runs: every kernel of the tables, at the shape of the row that it is to fill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_rig import DEVICE

from kineticlip_kernels import tuning
from kineticlip_kernels.tune import Target
from kineticlip_kernels.tune.shapes import Sizes
from kineticlip_kernels.tune.targets import targets

TINY = Sizes(frames=3, side=3, width=32, heads=2, clips=2, views=2, videos=3, classes=5, names=9,
             pixels=(12, 20), crop=12)  # fmt: skip
TARGETS = targets(TINY)


def test_every_kernel_has_a_target_and_every_target_a_row() -> None:
    table = tuning.read_table("default")
    assert {target.kernel for target in targets()} == set(table)
    for target in targets():
        row = table[target.kernel][tuning.row_number(table[target.kernel], target.sizes)]
        names = {key for key in row if not key.startswith("max_")}
        assert all(names == candidate.keys() for candidate in target.candidates), target.kernel


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: "-".join([t.kernel, *map(str, t.sizes)]))
def test_a_target_launches_its_kernel_with_its_sizes(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, int]] = []
    find = tuning._find

    def spy(table: str, kernel: str, sizes: tuple[tuple[str, int], ...]) -> Any:
        if kernel == target.kernel:
            asked.append(dict(sizes))
        return find(table, kernel, sizes)

    run = target.make(torch.device(DEVICE))
    monkeypatch.setattr(tuning, "_find", spy)
    run()
    assert asked
    for sizes in asked:
        assert {name: sizes[name] for name in target.sizes} == dict(target.sizes)
