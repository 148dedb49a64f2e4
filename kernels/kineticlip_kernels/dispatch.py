"""Which face of an op runs, and why not another. Choice is an argument; nothing is global."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

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
) -> str:
    """The face to run. "auto" is `fast` unless there is a reason against it, then `slow`.

    Raises UnsupportedInput where `fast` was asked for by name and cannot run.
    """
    if impl == "auto":
        return record_choice(op, slow if why_not else fast, why_not)
    if impl == fast and why_not:
        raise UnsupportedInput(f"{op}: impl={fast!r} cannot run: {'; '.join(why_not)}")
    if impl not in ("reference", fast, slow):
        raise UnsupportedInput(f"{op}: unknown impl {impl!r}; known: auto, reference, {fast}")
    return record_choice(op, impl)


def triton_reasons(impl: str, **tensors: Tensor) -> list[str]:
    """Why a Triton kernel cannot take these tensors; empty when it can.

    Under Triton's interpreter CPU tensors will do, but only for impl="triton": it is a debugger,
    thousands of times slower than the reference, and "auto" must not pick it.
    """
    interpreted = impl == "triton" and interpreting()
    reasons = []
    if not triton_installed():
        reasons.append("triton is not installed")
    for name, tensor in tensors.items():
        if not tensor.is_cuda and not interpreted:
            reasons.append(f"{name} is on {tensor.device.type}")
        if tensor.dtype not in TRITON_DTYPES:
            reasons.append(f"{name} is {dtype_name(tensor.dtype)} (supported: fp32, fp16, bf16)")
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


def triton_installed() -> bool:
    """Whether `import triton` would find something; imports nothing."""
    return TRITON_INSTALLED


def interpreting() -> bool:
    """Whether kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1 before its import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, bf16, ...: the short names used in messages, configs and results."""
    short = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16"}
    short |= {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}
    return short.get(dtype, str(dtype).removeprefix("torch."))
