"""What the kernel benchmarks share: shapes, rivals, cold-cache timing, measured limits.

On a GPU a case's inputs are copied until the copies pass three times the L2 cache, calls on them
in turn are captured in one CUDA graph, and replays of it are timed: no launch gaps, no warm
cache. Inputs are random, because zeros run faster. On a CPU calls are timed one by one, at small
shapes and on the same inputs, which its caches hold. What runs from a cache has no percentage of
the copy limit, which is memory's.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kineticlip_kernels.cost import Cost
from kineticlip_kernels.dispatch import dtype_name

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = (torch.bfloat16, torch.float16) if GPU else (torch.float32, torch.bfloat16)
COPY_BYTES = 1 << 30 if GPU else 1 << 25
MATMUL_SIDE = 8192 if GPU else 1024
MAX_CAPTURED = 200  # calls in one graph, where the copies of the inputs are fewer
MAX_COPIES = 8192  # of 18 KiB, they pass three times 50 MB; a graph of more calls takes seconds
WARM_UP_SECONDS = 0.2  # before a limit is measured: clocks rise within 100 ms
REPEATS = 20  # of which a limit is the fastest


@dataclass(frozen=True)
class Shape:
    """One engine shape: M images of N tokens, D wide, H heads."""

    name: str
    images: int
    tokens: int
    width: int
    heads: int

    @property
    def rows(self) -> int:
        return self.images * self.tokens

    @property
    def head_width(self) -> int:
        return self.width // self.heads


SHAPES = (
    (
        Shape("ViT-L/14-336 x 64", 64, 577, 1024, 16),  # two views of 32 frames
        Shape("ViT-L/14 x 32", 32, 257, 1024, 16),
        Shape("ViT-B/16 x 96", 96, 197, 768, 12),
    )
    if GPU
    else (Shape("ViT-B/32 x 1", 1, 50, 768, 12),)
)


@dataclass(frozen=True)
class Case:
    """One implementation of one op, at one shape and dtype.

    run(*make()) is what is timed, with its backward where direction says so. matrix_dtype: of the
    products that bound it, for its limit; dtype where it is None. short: of the few that are
    measured first.
    """

    op: str
    impl: str
    dtype: torch.dtype
    shape: Shape
    cost: Cost
    make: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]
    direction: str = "forward"  # or forward+backward
    matrix_dtype: torch.dtype | None = None
    short: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.direction} {dtype_name(self.dtype)} {self.shape.name}"

    def __str__(self) -> str:
        return f"{self.name}: {self.impl}"


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0, grad: bool = False) -> Tensor:
    values = scale * torch.randn(shape, device=DEVICE, dtype=torch.float32)
    return values.to(dtype).requires_grad_(grad)


def with_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Forward and backward in one call, for the gradients of the inputs that want one."""
    grads: list[Tensor] = []  # from above; made by the first call, which is not timed

    def run(*inputs: Any) -> Any:
        wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not grads:
            grads.extend(torch.randn_like(out) for out in outputs)
        return torch.autograd.grad(outputs, wanted, grads)

    return run


def timed(case: Case) -> Callable[..., Any]:
    """What is timed: the case's function, compiled and differentiated where it says so."""
    function = compiled(case.run) if case.impl == "torch.compile" else case.run
    return with_backward(function) if case.direction == "forward+backward" else function


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at fixed shapes, a graph of its own for every case."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def rivals(
    plain: Callable[..., Any], **kernels: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    """The plain reference; on a GPU torch.compile of it and the kernels too."""
    if not GPU:
        return {"reference": plain}
    return {"reference": plain, "torch.compile": plain, **kernels}


# What other libraries offer, by the package that has it.
LIBRARIES = {
    "liger": "liger_kernel",
    "xformers": "xformers",
    "flash-attention 4": "flash_attn.cute",
}


def installed(rival: str) -> bool:
    """Whether a rival's package is here; imports nothing but its parents."""
    package = LIBRARIES[rival]
    parent = package.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and (
        importlib.util.find_spec(package) is not None
    )


def absent() -> dict[str, str]:
    """The rivals that no row is about, and why; written into the result file."""
    if not GPU:
        return {name: "runs on GPUs only; this is a CPU" for name in LIBRARIES}
    return {
        name: f"{package} is not installed"
        for name, package in LIBRARIES.items()
        if not installed(name)
    }


@dataclass(frozen=True)
class Prepared:
    """calls() makes `count` calls of a case and waits for them; peak: see `peak_bytes`.

    cold: every call finds its inputs in memory, none in a cache.
    """

    calls: Callable[[], None]
    count: int
    peak: int | None
    cold: bool


def warm(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What is timed and its inputs, run once: compiled, and its results finite."""
    run, first = timed(case), case.make()
    assert finite(run(*first)), f"{case}: results that are not finite"
    return run, first


def prepare(case: Case) -> Prepared:
    """Runs a case until nothing is left to compile, and captures it where there is a GPU."""
    run, first = warm(case)
    if not GPU:
        return Prepared(lambda: run(*first), 1, None, cold=False)
    peak = peak_bytes(run, first)
    size = sum(value.numel() * value.element_size() for value in first if is_copied(value))
    copies, cold = copies_of(size, torch.cuda.get_device_properties(DEVICE).L2_cache_size)
    sets = [first] + [copied(first) for _ in range(copies - 1)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in itertools.islice(itertools.cycle(sets), 3):
            run(*inputs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(*sets[0])
        end.record()
        end.synchronize()
    torch.cuda.current_stream().wait_stream(stream)
    # A replay of about 20 ms, of every copy at least once.
    count = max(copies, min(MAX_CAPTURED, int(20 / max(begin.elapsed_time(end), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in itertools.islice(itertools.cycle(sets), count):
            run(*inputs)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return Prepared(replay, count, peak, cold)


def copies_of(size: int, cache: int) -> tuple[int, bool]:
    """How many copies of inputs of `size` bytes pass three times the cache, and whether they do.

    Inputs so small that MAX_COPIES do not are timed from the cache, on two copies.
    """
    copies = max(2, -(-3 * cache // max(size, 1)) + 1)
    return (copies, True) if copies <= MAX_COPIES else (2, False)


def is_copied(value: Any) -> bool:
    """Whether an input is one that every call of a graph has its own copy of."""
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def copied(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The same values elsewhere; modules and their parameters stay."""
    return tuple(
        value.detach().clone().requires_grad_(value.requires_grad) if is_copied(value) else value
        for value in inputs
    )


def finite(outputs: Any) -> bool:
    """Whether every floating tensor among the outputs is."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    floats = (torch.float32, torch.float16, torch.bfloat16)
    tensors = [out for out in outputs if isinstance(out, Tensor) and out.dtype in floats]
    return all(bool(torch.isfinite(out).all()) for out in tensors)


def peak_bytes(run: Callable[..., Any], inputs: Sequence[Any]) -> int:
    """GPU memory that one call takes beyond its inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*inputs)
    return torch.cuda.max_memory_allocated() - before


_limits: dict[str, float] = {}  # of this machine, measured once a run


def copy_limit() -> float:
    """Bytes a second, read and written, of a copy far larger than the caches."""
    return _limit("copy", _measure_copy)


def matmul_limit(dtype: torch.dtype) -> float:
    """Operations a second of PyTorch's own square matrix product; e4m3 by torch._scaled_mm."""
    return _limit(dtype_name(dtype), partial(_measure_matmul, dtype))


def share_limits(path: Path) -> None:
    """Takes the limits that another process of the same run has measured."""
    if path.exists():
        _limits.update(json.loads(path.read_text()))


def keep_limits(path: Path) -> None:
    """Leaves the limits for the processes that follow, and for the result file."""
    path.write_text(json.dumps(_limits))


def _limit(name: str, measure: Callable[[], float]) -> float:
    if name not in _limits:
        _limits[name] = measure()
    return _limits[name]


def _measure_copy() -> float:
    source = torch.empty(COPY_BYTES // 4, dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / best_seconds(lambda: target.copy_(source))


def _measure_matmul(dtype: torch.dtype) -> float:
    side = MATMUL_SIDE
    a, b = (torch.randn(side, side, device=DEVICE) for _ in range(2))
    if dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=DEVICE)
        a8, b8 = a.to(dtype), b.to(dtype).t()
        seconds = best_seconds(
            lambda: torch._scaled_mm(
                a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        )
    else:
        a, b = a.to(dtype), b.to(dtype)
        seconds = best_seconds(lambda: a @ b)
    return 2.0 * side**3 / seconds


def best_seconds(call: Callable[[], Any]) -> float:
    """The fastest of REPEATS calls after WARM_UP_SECONDS of calls: a limit is what is possible."""
    from kineticlip.runtime.machine import time_calls

    end = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < end:
        call()
        if GPU:
            torch.cuda.synchronize()
    return time_calls(call, warmup=1, repeats=REPEATS).least / 1000


def row(case: Case, prepared: Prepared, milliseconds: Sequence[float]) -> dict[str, Any]:
    """One row of a result file. Percent: of the faster of what memory and products allow here.

    None where memory is what bounds it and the inputs come from a cache.
    """
    ordered = sorted(milliseconds)
    p20, p50, p80 = (ordered[int(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
    flops_limit = matmul_limit(case.matrix_dtype or case.dtype) if case.cost.flops else 1.0
    least = case.cost.seconds(flops_limit, copy_limit())
    from_memory = case.cost.flops / flops_limit < least
    return {
        "case": case.name,
        "op": case.op,
        "impl": case.impl,
        "direction": case.direction,
        "dtype": dtype_name(case.dtype),
        "shape": {"name": case.shape.name, **dims(case.shape)},
        "n": len(ordered),
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "peak_bytes": prepared.peak,
        "flops": case.cost.flops,
        "bytes": case.cost.bytes,
        "gb_per_s": case.cost.bytes / p50 / 1e6,
        "tflop_per_s": case.cost.flops / p50 / 1e9,
        "percent_of_limit": 1e5 * least / p50 if prepared.cold or not from_memory else None,
    }


def dims(shape: Shape) -> dict[str, int]:
    return {"M": shape.images, "N": shape.tokens, "D": shape.width, "H": shape.heads}


def spread(*families: Callable[[Shape, torch.dtype], Iterator[Case]]) -> list[Case]:
    """The cases of every shape and dtype of this machine.

    On a GPU fp16, whose kernels are bf16's, at the first shape alone, and torch.compile, which
    takes seconds a case, in bf16 alone.
    """
    return [
        case
        for shape, dtype, family in itertools.product(SHAPES, DTYPES, families)
        for case in family(shape, dtype)
        if dtype != torch.float16 or (shape == SHAPES[0] and case.impl != "torch.compile")
    ]
