"""Tables made inside torch.inference_mode serve the training that follows."""

from __future__ import annotations

import torch
from kernel_rig import DEVICE, randn
from torch import Tensor
from torch._subclasses import FakeTensorMode

from kineticlip_kernels.evl import displacement, offsets
from kineticlip_kernels.patches import resample_table
from kineticlip_kernels.patches.windows import windows

HERE = torch.device(DEVICE)


def test_a_table_first_used_in_inference_mode_does_not_stop_training() -> None:
    weights = [randn(3 * 13, 4, seed=seed) for seed in (0, 1)]  # a grid that no other test has
    maps = randn(2, 1, 2, 14, 14, grad=False)

    def total() -> Tensor:
        return displacement(maps, *weights, grid=(2, 7), impl="reference").sum()

    compiled = torch.compile(lambda: total() + total(), fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(2 * total(), compiled())
    assert all(grad.any() for grad in torch.autograd.grad(total(), weights))


def test_tables_are_made_once_as_ordinary_tensors() -> None:
    crops = ((0, 0, False),)
    with torch.inference_mode():
        made = [
            offsets((2, 9), HERE),
            *resample_table(61, 19, "bicubic"),
            windows((61, 61), (19, 19), crops, 9, "bicubic", HERE).rows_weights,
        ]
    assert not any(table.is_inference() for table in made)
    assert offsets((2, 9), HERE) is made[0]
    assert windows((61, 61), (19, 19), crops, 9, "bicubic", HERE)[4] is made[3]


def test_a_table_first_used_on_fake_tensors_is_not_kept() -> None:
    with FakeTensorMode():
        offsets((2, 11), HERE)
    assert offsets((2, 11), HERE).sum() == offsets((2, 11), HERE).cpu().clone().sum()
    assert type(offsets((2, 11), HERE)) is Tensor
