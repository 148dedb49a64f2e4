"""What every Triton face shares: fresh outputs, and one differentiable op out of two launchers.

Imports no triton: the launchers live in the *_triton.py files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Tensors = tuple[Tensor, ...]


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel to fill. The tests fill it with NaN first, so that a gap shows."""
    return torch.empty(shape, dtype=dtype, device=device)


def rows_of(x: Tensor) -> Tensor:
    """[..., D] -> [R, D], a view where strides permit, with neighbouring columns."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.numel() == 0 else flat.contiguous()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: the width of a Triton block."""
    return 1 << max(n - 1, 0).bit_length()


def on_device_of(inputs: Sequence[Any], function: Callable[..., Any]) -> Any:
    """function(*inputs), launched on the GPU that the first tensor is on.

    Triton launches on the current one, whatever its arguments are. Autograd and Inductor set the
    current device themselves.
    """
    device = next((value.device for value in inputs if isinstance(value, Tensor)), None)
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return function(*inputs)
    with torch.cuda.device(device):
        return function(*inputs)


class Operator:
    """An op without gradients: its launcher in eager mode, kineticlip::<name> to torch.compile."""

    def __init__(self, name: str, forward: Callable[..., Any], *, fake: Callable[..., Any]) -> None:
        self._launch = forward
        self.operator = torch.library.custom_op(f"kineticlip::{name}", forward, mutates_args=())
        self.operator.register_fake(fake)

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.operator(*inputs)
        return on_device_of(inputs, self._launch)


class FusedOp:
    """A differentiable op made of two launchers, in eager mode and under torch.compile.

    forward(*inputs) returns a tuple of new tensors: `results` of them are the op's, the others
    (statistics) only its backward needs. backward(flags, *saved, *grads, *scalars) returns a list
    of gradients, of which input i gets number spread[i]; flags say which inputs want theirs, and
    a gradient that nobody wants may be an empty tensor. save(inputs, outputs) gives what to keep:
    (tensors, scalars).

    In eager mode the launchers are called directly. torch.library's boundary costs about 60
    microseconds, more than most of these kernels; torch.compile, which removes it, sees two
    custom operators, kineticlip::<name> and kineticlip::<name>_backward.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Tensors],
        backward: Callable[..., list[Tensor]],
        *,
        fake_forward: Callable[..., Tensors],
        fake_backward: Callable[..., list[Tensor]],
        save: Callable[[Tensors, Tensors], tuple[Sequence[Tensor | None], tuple[Any, ...]]],
        results: int,
        spread: tuple[int, ...],
    ) -> None:
        self.name, self.results, self._launch = name, results, forward
        self.operator = torch.library.custom_op(f"kineticlip::{name}", forward, mutates_args=())
        self.operator.register_fake(fake_forward)
        self.backward_operator = torch.library.custom_op(
            f"kineticlip::{name}_backward", backward, mutates_args=()
        )
        self.backward_operator.register_fake(fake_backward)

        def remember(ctx: Any, inputs: Tensors, output: Tensors) -> None:
            tensors, ctx.scalars = save(inputs, output)
            ctx.save_for_backward(*tensors)
            ctx.set_materialize_grads(False)
            ctx.count = len(inputs)
            ctx.mark_non_differentiable(*output[results:])

        def differentiate(run: Callable[..., list[Tensor]], ctx: Any, *grads: Tensor | None) -> Any:
            flags = list(ctx.needs_input_grad[: len(spread)])
            wanted: list[Tensor | None] = [None] * ctx.count
            if any(grad is not None for grad in grads[:results]):
                found = run(flags, *ctx.saved_tensors, *grads[:results], *ctx.scalars)
                for index, flag in enumerate(flags):
                    wanted[index] = found[spread[index]] if flag else None
            return tuple(wanted)

        self.operator.register_autograd(
            lambda ctx, *grads: differentiate(self.backward_operator, ctx, *grads),
            setup_context=remember,
        )
        members = {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(remember),
            # A second derivative is an error, not a wrong number.
            "backward": staticmethod(
                once_differentiable(lambda ctx, *grads: differentiate(backward, ctx, *grads))
            ),
        }
        function: Any = type(f"{name}_function", (torch.autograd.Function,), members)
        self._apply: Callable[..., Tensors] = function.apply

    def __call__(self, *inputs: Any) -> Tensors:
        """The op's results, a tuple of `results` tensors."""
        return self.outputs(*inputs)[: self.results]

    def outputs(self, *inputs: Any) -> Tensors:
        """The results, and behind them the statistics, which have no gradient."""
        if torch.compiler.is_compiling():
            return tuple(self.operator(*inputs))
        recorded = torch.is_grad_enabled() and any(_wants_grad(value) for value in inputs)
        outputs: Tensors = on_device_of(inputs, self._apply if recorded else self._launch)
        return outputs


def _wants_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
