"""What every Triton face shares: fresh outputs, and one differentiable op out of two launchers.

Imports no triton: the launchers live in the *_triton.py files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Tensors = tuple[Tensor, ...]
NEAR = 1 << 31


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel to fill. The tests fill it with NaN first, so that a gap shows."""
    return torch.empty(shape, dtype=dtype, device=device)


def rows_of(x: Tensor) -> Tensor:
    """[..., D] -> [R, D], a view where strides permit, with neighbouring columns."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.numel() == 0 else flat.contiguous()


def readable(x: Tensor) -> Tensor:
    """The same tensor with neighbouring columns and near elements, which most kernels assume."""
    return x if x.stride(-1) == 1 and near(x) else x.contiguous()


def near(x: Tensor) -> bool:
    """Whether offsets into one element of axis 0 fit in 32 bits, which is what kernels count in.

    Only axis 0 is counted in 64. False for a view such as planes [3, U, H, W] seen as images.
    """
    sizes = zip(x.shape[1:], x.stride()[1:], strict=True)
    return sum((size - 1) * stride for size, stride in sizes if size) < NEAR


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


def _register(name: str, function: Callable[..., Any]) -> Any:
    """kineticlip::<name>, launched on the device of its inputs whoever compiles it."""

    @functools.wraps(function)
    def guarded(*inputs: Any) -> Any:
        return on_device_of(inputs, function)

    return torch.library.custom_op(f"kineticlip::{name}", guarded, mutates_args=())


class Operator:
    """An op without gradients: its launcher in eager mode, kineticlip::<name> to torch.compile."""

    def __init__(self, name: str, forward: Callable[..., Any], *, fake: Callable[..., Any]) -> None:
        self._launch = forward
        self.operator = _register(name, forward)
        self.operator.register_fake(fake)

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.operator(*inputs)
        return on_device_of(inputs, self._launch)


class FusedOp:
    """A differentiable op made of two launchers, in eager mode and under torch.compile.

    forward(*inputs) returns new tensors: `results` of them are the op's, the others (statistics)
    only its backward needs. One alone is returned as it is: of a tuple of one torch.compile
    (PyTorch 2.11) makes a graph for every shape. backward(flags, *saved, *grads, *scalars)
    returns a list of gradients, of which input i gets number spread[i]; flags say which inputs
    want theirs, and a gradient that nobody wants, or that does not exist, may be an empty tensor.
    save(inputs, outputs) gives what to keep: (tensors, scalars).

    In eager mode the launchers are called directly. torch.library's boundary costs about 60
    microseconds, more than most of these kernels; torch.compile, which removes it, sees two
    custom operators, kineticlip::<name> and kineticlip::<name>_backward.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Tensor | Tensors],
        backward: Callable[..., list[Tensor]],
        *,
        fake_forward: Callable[..., Tensor | Tensors],
        fake_backward: Callable[..., list[Tensor]],
        save: Callable[[Tensors, Tensors], tuple[Sequence[Tensor | None], tuple[Any, ...]]],
        results: int,
        spread: tuple[int, ...],
    ) -> None:
        self.name, self.results, self._launch = name, results, forward
        self.operator = _register(name, forward)
        self.operator.register_fake(fake_forward)
        self.backward_operator = _register(f"{name}_backward", backward)
        self.backward_operator.register_fake(fake_backward)

        def remember(ctx: Any, inputs: Tensors, output: Tensor | Tensors) -> None:
            outputs = _several(output)
            tensors, ctx.scalars = save(inputs, outputs)
            ctx.save_for_backward(*tensors)
            ctx.set_materialize_grads(False)
            ctx.count = len(inputs)
            ctx.filled = [not isinstance(value, Tensor) or value.numel() > 0 for value in inputs]
            ctx.mark_non_differentiable(*outputs[results:])

        def differentiate(run: Callable[..., list[Tensor]], ctx: Any, *grads: Tensor | None) -> Any:
            flags = list(ctx.needs_input_grad[: len(spread)])
            wanted: list[Tensor | None] = [None] * ctx.count
            if any(grad is not None for grad in grads[:results]):
                found = run(flags, *ctx.saved_tensors, *grads[:results], *ctx.scalars)
                for index, flag in enumerate(flags):
                    grad = found[spread[index]]
                    # Nothing for something: the results in use do not depend on this input.
                    none = not flag or (grad.numel() == 0 and ctx.filled[index])
                    wanted[index] = None if none else grad
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
        self._apply: Callable[..., Tensor | Tensors] = function.apply

    def __call__(self, *inputs: Any) -> Tensors:
        """The op's results, a tuple of `results` tensors."""
        return self.outputs(*inputs)[: self.results]

    def outputs(self, *inputs: Any) -> Tensors:
        """The results, and behind them the statistics, which have no gradient."""
        if torch.compiler.is_compiling():
            return _several(self.operator(*inputs))
        recorded = torch.is_grad_enabled() and any(_wants_grad(value) for value in inputs)
        return _several(on_device_of(inputs, self._apply if recorded else self._launch))


def _several(outputs: Tensor | Tensors) -> Tensors:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _wants_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
