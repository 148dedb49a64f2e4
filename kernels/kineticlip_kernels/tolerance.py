"""The one rule for "equal enough", used by the tests, the benchmarks and `kineticlip doctor`.

A result may be at most twice as far from the truth as plain PyTorch in the same dtype is:

    max|candidate - truth| <= 2 * max|baseline - truth| + FLOOR[dtype] * max|truth|

truth: the reference in float64 on the same, already rounded, inputs; baseline: the reference in
the dtype under test. The factor 2 leaves room for another order of summation, the floor for
results that the baseline happens to get exactly right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A few units in the last place: 2^-53, 2^-24, 2^-11 and 2^-8 are half of one.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}


@dataclass(frozen=True)
class Comparison:
    """One tensor of one op, compared: `error` must not exceed `bound`."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False when the error is NaN

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return f"{self.name}: error {self.error:.3g}, allowed {self.bound:.3g}: {verdict}"


def compare(name: str, candidate: Tensor, baseline: Tensor, truth: Tensor) -> Comparison:
    """Applies the rule to one tensor; shapes and the dtypes of the first two must agree.

    NaN anywhere in the candidate is an infinite error, so poisoned outputs cannot pass.
    """
    if candidate.shape != truth.shape or candidate.dtype != baseline.dtype:
        raise AssertionError(
            f"{name}: {tuple(candidate.shape)} {candidate.dtype}, "
            f"expected {tuple(truth.shape)} {baseline.dtype}"
        )
    scale = _largest(truth)
    bound = 2 * max_error(baseline, truth) + FLOOR[candidate.dtype] * scale
    return Comparison(name, max_error(candidate, truth), bound)


def verify(
    reference: Callable[..., Any], candidate: Callable[..., Any], inputs: Mapping[str, Any]
) -> list[Comparison]:
    """Applies the rule to every output of an op, and to the gradient of every input that wants one.

    Both functions are called with `inputs` as keywords: tensors, anything else, and lists,
    tuples or dicts of both. Outputs are a tensor or a tuple of tensors. The gradient that comes
    from above is one fixed random draw for all three runs.
    """
    runs = [_run(candidate, inputs, None), _run(reference, inputs, None)]
    runs.append(_run(reference, inputs, torch.float64))
    found, baseline, truth = runs
    assert found.keys() == truth.keys(), (list(found), list(truth))
    return [compare(name, found[name], baseline[name], truth[name]) for name in truth]


def _run(
    function: Callable[..., Any], inputs: Mapping[str, Any], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Outputs and gradients by name; dtype, where given, replaces that of every float input."""
    fresh = {name: _fresh(value, dtype) for name, value in inputs.items()}
    result = function(**fresh)
    outputs = list(result) if isinstance(result, tuple) else [result]
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    wanted = [(name, t) for name, t in _tensors("", fresh) if t.requires_grad]
    if not wanted:
        return named
    generator = torch.Generator().manual_seed(len(outputs))
    given = [torch.randn(output.shape, generator=generator) for output in outputs]
    original = next(t.dtype for _, t in _tensors("", inputs) if t.requires_grad)
    grads = torch.autograd.grad(
        outputs,
        [tensor for _, tensor in wanted],
        [grad.to(original).to(out) for grad, out in zip(given, outputs, strict=True)],
    )
    return named | {f"grad {name}": g for (name, _), g in zip(wanted, grads, strict=True)}


def _fresh(value: Any, dtype: torch.dtype | None) -> Any:
    """A leaf with the same values, strides and requires_grad, in dtype where it is a float."""
    if isinstance(value, (list, tuple)):
        return type(value)(_fresh(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _fresh(item, dtype) for key, item in value.items()}
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    leaf = value.detach()
    return (leaf if dtype is None else leaf.to(dtype)).requires_grad_(value.requires_grad)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}".strip("."), item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}.{index}", item)


def max_error(candidate: Tensor, truth: Tensor) -> float:
    """max|candidate - truth| in float64; infinite where the candidate has NaN, 0 when empty."""
    return _largest((candidate.double() - truth.double()).nan_to_num(nan=float("inf")))


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
