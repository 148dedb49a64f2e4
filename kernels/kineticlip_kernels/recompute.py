"""Activations that are cheaper to make again than to keep: LayerNorm's and QuickGELU's outputs.

A linear layer keeps its input for its weight's gradient. Where that input is the output of one
of this package's ops, `recomputed()` keeps the op's own inputs instead, which the op keeps
anyway, and makes the output again in the backward pass: one memory-bound kernel each, no GEMM.
Of the 16 activations of width D that a ViT block keeps, 6 go (2 LayerNorms, 4 of the MLP's).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Make = Callable[[], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to make one tensor again, and the tensor it was, while that lives."""

    output: weakref.ref[Tensor]
    version: int
    make: Make


@dataclass(frozen=True)
class Form:
    """What autograd keeps instead of a tensor: how to make it, and how to look at it."""

    make: Make
    shape: torch.Size
    stride: tuple[int, ...]


# Recipes of the forward pass under way, by the address of the output's storage.
_recipes: ContextVar[dict[int, Recipe] | None] = ContextVar("recipes", default=None)


def remember(output: Tensor, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Notes that function(*inputs) gives `output` again; returns output.

    Does nothing outside `recomputed()`. The inputs should be tensors that the backward pass keeps
    in any case, or parameters, which must be in place when it begins (ZeRO-3 keeps the small
    parameters of a LayerNorm in place).
    """
    if torch.compiler.is_compiling():
        return output
    recipes = _recipes.get()
    if recipes is not None and output.requires_grad:
        values = [v.detach() if isinstance(v, Tensor) else v for v in inputs]
        address = output.untyped_storage().data_ptr()
        recipes[address] = Recipe(weakref.ref(output), output._version, partial(function, *values))
    return output


@contextmanager
def recomputed() -> Iterator[None]:
    """Within it, what autograd would keep and a recipe can make is made again instead.

    Wrap the forward pass; the backward pass may run outside. Gradients do not change by a bit:
    the same kernel makes the same output from the same input. Nothing for torch.compile, whose
    partitioner decides this itself.
    """
    recipes: dict[int, Recipe] = {}

    def pack(tensor: Tensor) -> Tensor | Form:
        recipe = recipes.get(tensor.untyped_storage().data_ptr())
        if recipe is None or not _same(recipe, tensor):
            return tensor
        return Form(recipe.make, tensor.shape, tensor.stride())

    def unpack(packed: Tensor | Form) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return packed.make().as_strided(packed.shape, packed.stride)

    token = _recipes.set(recipes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _recipes.reset(token)


def _same(recipe: Recipe, tensor: Tensor) -> bool:
    """Whether tensor is the recipe's output, or a view of all of it, unchanged since."""
    output = recipe.output()
    return (
        output is not None
        and output.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        and tensor.dtype == output.dtype
        and tensor.numel() == output.numel()
        and tensor.storage_offset() == output.storage_offset() == 0
        and output.is_contiguous()
        and tensor._version == recipe.version
    )
