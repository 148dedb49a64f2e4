"""Which face of an op runs, and why not another. Choice is an argument; nothing is global."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "triton"]

# What the Triton kernels load and store; they compute in fp32.
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Looked up once: torch.compile traces through the choice of a face, but not through find_spec.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class UnsupportedInput(ValueError):
    """The face asked for cannot run on these tensors; the message lists every reason."""


@dataclass(frozen=True)
class Choice:
    """One call's face, and the reasons against the faster one."""

    op: str
    face: str
    why_not: tuple[str, ...]


_choices: ContextVar[list[Choice] | None] = ContextVar("choices", default=None)


@contextmanager
def recorded_choices() -> Iterator[list[Choice]]:
    """A list that fills with the choices made within: what runs here, and why not something else.

    Calls under torch.compile are not seen.
    """
    choices: list[Choice] = []
    token = _choices.set(choices)
    try:
        yield choices
    finally:
        _choices.reset(token)


def record_choice(op: str, face: str, why_not: Sequence[str] = ()) -> str:
    """Notes a choice for `recorded_choices`; returns face."""
    choices = None if torch.compiler.is_compiling() else _choices.get()
    if choices is not None:
        choices.append(Choice(op, face, tuple(why_not)))
    return face


def choose(
    op: str,
    impl: str,
    why_not: Sequence[str],
    *,
    fast: str = "triton",
    slow: str = "reference",
    known: Sequence[str] = get_args(Impl),
) -> str:
    """The face to run. "auto" is `fast` unless there is a reason against it, then `slow`.

    Raises UnsupportedInput where `fast` was asked for by name and cannot run, and for an impl
    that is not `known`.
    """
    if impl not in known:
        raise UnsupportedInput(f"{op}: unknown impl {impl!r}; known: {', '.join(known)}")
    if impl == "auto":
        return record_choice(op, slow if why_not else fast, why_not)
    if impl == fast and why_not:
        raise UnsupportedInput(
            f"{op}: impl={fast!r} cannot run: {'; '.join(why_not)}; impl='auto' takes {slow}"
        )
    return record_choice(op, impl)


def check_tensors(op: str, /, **operands: Any) -> None:
    """Raises UnsupportedInput unless the operands are tensors on one device.

    A kernel would read an address of another device as its own. None is an operand left out.
    """
    given = {name: operand for name, operand in operands.items() if operand is not None}
    for name, operand in given.items():
        if not isinstance(operand, Tensor):
            raise UnsupportedInput(f"{op}: {name} is a {type(operand).__name__}, not a tensor")
    devices = {name: operand.device for name, operand in given.items()}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} is on {device}" for name, device in devices.items())
        raise UnsupportedInput(f"{op}: {places}; expected one device")


def check_operands(op: str, /, **operands: Any) -> None:
    """`check_tensors`, and that their elements are floating-point numbers."""
    device = None
    # Every call of every op passes here, and nearly always all is well.
    for operand in operands.values():
        if operand is None:
            continue
        if not isinstance(operand, Tensor) or not operand.is_floating_point():
            break
        if device is not None and operand.device != device:
            break
        device = operand.device
    else:
        return
    check_tensors(op, **operands)
    for name, operand in operands.items():
        if operand is not None and not operand.is_floating_point():
            raise UnsupportedInput(
                f"{op}: {name} is {dtype_name(operand.dtype)}, expected a floating dtype"
            )


def triton_reasons(impl: str, **tensors: Tensor) -> list[str]:
    """Why a Triton kernel cannot take these tensors; empty when it can.

    Under Triton's interpreter CPU tensors will do, but only for impl="triton": it is a debugger,
    thousands of times slower than the reference, and "auto" must not pick it.
    """
    interpreted = impl == "triton" and interpreting()
    garbled = interpreted and not interpreter_repaired()
    reasons = []
    if not triton_installed():
        reasons.append("triton is not installed")
    for name, tensor in tensors.items():
        if not tensor.is_cuda and not interpreted:
            reasons.append(f"{name} is on {tensor.device.type}")
        if tensor.dtype not in TRITON_DTYPES:
            reasons.append(f"{name} is {dtype_name(tensor.dtype)} (supported: fp32, fp16, bf16)")
        if garbled and tensor.dtype == torch.bfloat16:
            reasons.append(f"{name} is bf16, which Triton's interpreter gets wrong unless repaired")
    return reasons


def matrix_reasons(impl: str, **tensors: Tensor) -> list[str]:
    """`triton_reasons` of a kernel whose products run on 16-bit tensor cores."""
    reasons = triton_reasons(impl, **tensors)
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        reasons.append(f"{', '.join(tensors)} differ in dtype")
    if not interpreting():
        wide = [name for name, tensor in tensors.items() if tensor.dtype == torch.float32]
        reasons += [f"{name} is fp32, and its products need 16 bits" for name in wide]
    return reasons


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off for the device of x: for sums that an op promises in fp32."""
    if x.device.type == "meta":
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def wide(x: Tensor) -> Tensor:
    """x in fp32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def triton_installed() -> bool:
    """Whether `import triton` would find something; imports nothing."""
    return TRITON_INSTALLED


def interpreting() -> bool:
    """Whether kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1 before its import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def interpreter_repaired() -> bool:
    """Whether somebody replaced how Triton's interpreter casts.

    The stock one (Triton 3.6) takes bf16 for 16-bit integers, without a word. Imports nothing:
    what was never imported was never replaced.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return False
    return bool(interpreter.InterpreterBuilder.cast_impl.__module__ != interpreter.__name__)


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, bf16, ...: the short names used in messages, configs and results."""
    short = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16"}
    short |= {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}
    return short.get(dtype, str(dtype).removeprefix("torch."))
