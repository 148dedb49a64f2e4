"""Repairs of Triton 3.6's CPU interpreter, for the tests alone. Import it after triton.

The stock interpreter keeps bf16 as uint16 bit patterns: it truncates where hardware rounds (e4m3
too), and adds, compares and multiplies the bit patterns themselves without an error. Here bf16
operands are widened to fp32, and results rounded to nearest even, which is bit-equal to torch.
NumPy from 2.4 on also rejects the interpreter's loop bounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def install() -> None:
    """Patches the interpreter of this process, once."""
    if getattr(Builder, "_bf16_repaired", False):
        return
    Builder._bf16_repaired = True
    _repair_casts()
    _repair_arithmetic()
    _repair_sum()
    _repair_loop_bounds()


def round_to_bf16(values: Any) -> Any:
    """fp32 -> bf16 bit patterns, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded = rounded.reshape(np.shape(values))
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def widen_bf16(patterns: Any) -> Any:
    """bf16 bit patterns -> fp32, exact."""
    bits = np.ascontiguousarray(patterns).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(np.shape(patterns))


def round_to_e4m3(values: Any) -> Any:
    """fp32 -> e4m3 bit patterns, to nearest even and saturating, as the hardware's cast does."""
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    patterns = wide.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    return patterns.numpy().reshape(np.shape(values))


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and not isinstance(handle.dtype, tl.pointer_type)


def _widen(handle: Any) -> Any:
    return Handle(widen_bf16(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle: Any) -> Any:
    if handle.data.dtype != np.float32:  # a comparison
        return handle
    return Handle(round_to_bf16(handle.data), tl.bfloat16)


def _repair_casts() -> None:
    cast, float_cast = Builder.cast_impl, Builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _is_bf16(source) and target.scalar != tl.bfloat16:
            wide = _widen(source)
            return wide if target.scalar == tl.float32 else cast(self, wide, target)
        if target.scalar == tl.bfloat16 and not _is_bf16(source):
            return Handle(round_to_bf16(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target.scalar == tl.float8e4nv:
            return Handle(round_to_e4m3(_widen(source).data), tl.float8e4nv)
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return float_cast(self, source, target, rounding)

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _repair_arithmetic() -> None:
    binary, ternary, unary = Builder.binary_op, Builder.ternary_op, Builder.unary_op
    dot = Builder.create_dot

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if _is_bf16(left) and _is_bf16(right):
            return _narrow(binary(self, _widen(left), _widen(right), op))
        return binary(self, left, right, op)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        if _is_bf16(c) and op is not np.where:
            return _narrow(ternary(self, _widen(a), _widen(b), _widen(c), op))
        return ternary(self, a, b, c, op)

    def unary_op(self: Any, a: Any, op: Any) -> Any:
        return _narrow(unary(self, _widen(a), op)) if _is_bf16(a) else unary(self, a, op)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return dot(self, _widen(a), _widen(b), d, precision, imprecise)

    Builder.binary_op, Builder.ternary_op = binary_op, ternary_op
    Builder.unary_op, Builder.create_dot = unary_op, create_dot


def _repair_sum() -> None:
    plain = interpreter.ReduceOps.sum

    def reduce_sum(self: Any, operand: Any) -> Any:
        if not _is_bf16(operand.handle):
            return plain(self, operand)
        wide = widen_bf16(operand.handle.data)
        total = np.sum(wide, axis=self.axis, keepdims=self.keep_dims, dtype=np.float32)
        return self.to_tensor(round_to_bf16(total), operand.dtype)

    interpreter.ReduceOps.sum = reduce_sum


def _repair_loop_bounds() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
