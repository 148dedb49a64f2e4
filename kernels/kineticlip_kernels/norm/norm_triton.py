"""The Triton faces of `layer_norm` and `add_layer_norm`: launchers, fakes and what is kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.launch import FusedOp
from kineticlip_kernels.norm.backward_triton import launch_backward
from kineticlip_kernels.norm.forward_triton import launch_forward


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The Triton face of `layer_norm`."""
    (y,) = _layer_norm(x, weight, bias, eps)
    return y


def add_layer_norm_triton(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The Triton face of `add_layer_norm`."""
    total, y = _add_layer_norm(residual, update, weight, bias, eps)
    # Parameters alone give y a gradient, never the stream.
    return (total if residual.requires_grad or update.requires_grad else total.detach()), y


def _layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = launch.empty(*x.shape, dtype=x.dtype, device=x.device)
    _, mean, rstd = launch_forward(x, None, weight, bias, eps, y=y)
    return y, mean, rstd


def _layer_norm_backward(
    flags: list[bool], x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, grad_y: Tensor
) -> list[Tensor]:
    return list(launch_backward(x, weight, mean, rstd, None, grad_y, any(flags[1:])))


def _add_layer_norm_forward(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = launch.empty(*residual.shape, dtype=residual.dtype, device=residual.device)
    total, mean, rstd = launch_forward(residual, update, weight, bias, eps, y=y)
    assert total is not None
    return total, y, mean, rstd


def _add_layer_norm_backward(
    flags: list[bool],
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_total: Tensor | None,
    grad_y: Tensor | None,
) -> list[Tensor]:
    if grad_y is None:  # only the stream went on
        assert grad_total is not None
        stream = grad_total.clone(memory_format=torch.contiguous_format)
        return [stream, weight.new_empty(0), weight.new_empty(0)]
    return list(launch_backward(total, weight, mean, rstd, grad_total, grad_y, any(flags[2:])))


def _fake_statistics(x: Tensor) -> Tensor:
    # math.prod, not numel, which would be a number of its own for every batch size.
    return x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


def _fake_gradients(x: Tensor, weight: Tensor, parameters: bool) -> list[Tensor]:
    like = [weight.new_empty(weight.shape if parameters else 0) for _ in range(2)]
    return [x.new_empty(x.shape), *like]


_layer_norm = FusedOp(
    "layer_norm",
    _layer_norm_forward,
    _layer_norm_backward,
    fake_forward=lambda x, weight, bias, eps: (
        x.new_empty(x.shape),
        _fake_statistics(x),
        _fake_statistics(x),
    ),
    fake_backward=lambda flags, x, weight, mean, rstd, grad_y: _fake_gradients(
        x, weight, any(flags[1:])
    ),
    save=lambda inputs, outputs: ((*inputs[:2], *outputs[1:]), ()),
    results=1,
    spread=(0, 1, 2),  # x, weight, bias
)
_add_layer_norm = FusedOp(
    "add_layer_norm",
    _add_layer_norm_forward,
    _add_layer_norm_backward,
    fake_forward=lambda residual, update, weight, bias, eps: (
        residual.new_empty(residual.shape),
        residual.new_empty(residual.shape),
        _fake_statistics(residual),
        _fake_statistics(residual),
    ),
    fake_backward=lambda flags, total, weight, mean, rstd, grad_total, grad_y: _fake_gradients(
        total, weight, grad_y is not None and any(flags[2:])
    ),
    save=lambda inputs, outputs: ((outputs[0], inputs[2], *outputs[2:]), ()),
    results=2,
    spread=(0, 0, 1, 2),  # residual and update have one gradient
)
