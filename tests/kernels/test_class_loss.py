"""Text4Vis's loss with its kernels equals the plain one: the head's ops behind each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from kernel_rig import DEVICE, MATRIX, check, randn
from test_trunk import tower
from torch import Tensor
from torch.func import functional_call

from kineticlip.methods.text4vis import VideoCLIP
from kineticlip.models.classifier import Classifier
from kineticlip_kernels.dispatch import recorded_choices


def test_class_loss_and_every_gradient() -> None:
    """Text4Vis behind its frames: mean, norm, cosines, cross entropy and the likeliest class."""
    labels = torch.tensor([4, 0, 6], device=DEVICE)

    def of(impl: Any) -> VideoCLIP:
        model = VideoCLIP(tower(impl), None, embed=16).to(DEVICE)
        rows = randn(7, 16, seed=1, grad=False).cpu()
        model.set_classifier(Classifier(rows, tuple("abcdefg")))
        return model

    def loss(impl: Any) -> Callable[..., Tensor]:
        model = of(impl)
        return lambda frames, **own: functional_call(model, own, (frames, labels))[0]

    frames = randn(3, 4, 16, dtype=MATRIX)
    check(loss("reference"), loss("triton"), frames=frames, logit_scale=randn(1)[0])
    with recorded_choices() as choices, torch.no_grad():
        value, accuracy = of("triton")(frames, labels)
    ops = {"mean_normalize", "class_cross_entropy", "top_classes"}
    assert {(c.op, c.face) for c in choices} == {(op, "triton") for op in ops}
    logits = of("reference")(frames)
    torch.testing.assert_close(value, F.cross_entropy(logits, labels))
    assert accuracy == (logits.argmax(dim=-1) == labels).float().mean()
