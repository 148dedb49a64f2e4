"""A model made ready to score: precision, packed layers, chunk size, compilation, CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from kineticlip.config import Config, EvalPrecision
from kineticlip.methods.method import as_video_model
from kineticlip.models.fp8 import quantize_tower
from kineticlip.models.packed import ByteLinear, PackedLinear, compile_bytes, pack_tower
from kineticlip.models.steady import compiled, graphed
from kineticlip.models.vision import VisionTransformer
from kineticlip.runtime.compiler import why_no_compiler
from kineticlip.runtime.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES["int8"] = DTYPES["fp8"] = torch.bfloat16  # of everything but the tower's products
COMPILED_FROM = 5000  # images of a run, to earn back its compilation


def make_steady(
    model: nn.Module, config: Config, *, device: torch.device, chunk: int, images: int
) -> tuple[int, list[str]]:
    """Readies `model.visual` for about `images` images; (images per forward, what was chosen).

    The chunk is probed where it is not given, batch shapes may vary and the run is long enough.
    eval.compile: auto records a CUDA graph on a GPU and leaves the packed layers of a CPU alone,
    which cost no compilation; always compiles for either; never does neither. int8 has its
    quantisation compiled: by `always`, and by `auto` in runs that are long enough to earn it back.
    """
    if config.eval.compile == "always" and (reason := why_no_compiler()):
        raise UserError(f"eval.compile=always: {reason}; or take eval.compile=never")
    tower = model.get_submodule("visual")
    notes = [f"{config.eval.precision} on {device.type}"]
    # Methods that reach into the tower, or show it whole clips, would not use the result.
    plain = as_video_model(model).plain_tower and isinstance(tower, VisionTransformer)
    fixed = config.eval.batch_frames or config.eval.deterministic
    if plain and not fixed and images >= PROBE_SHARE * 4 * LARGEST[device.type]:
        probe = probe_chunk(
            tower,
            device=device,
            arch=config.model.arch,
            precision=config.eval.precision,
            resolution=config.data.resolution,
        )
        chunk = probe.chunk
        notes.append(f"chunk probed: {chunk} at {probe.rates[chunk]:.1f} images/s")
    if any(isinstance(layer, ByteLinear | PackedLinear) for layer in tower.modules()):
        notes.append("layers packed by oneDNN")
    if config.eval.precision == "int8":
        if config.eval.compile == "always" or (
            config.eval.compile == "auto"
            and not fixed
            and images >= COMPILED_FROM
            and not why_no_compiler()
        ):
            compile_bytes(tower)
            notes.append("quantisation compiled by Inductor")
    elif config.eval.compile == "always":
        if not plain:
            raise UserError(
                "eval.compile=always: only for methods that encode single images by a plain ViT"
            )
        model.visual = compiled(tower, chunk)
        notes.append("compiled by Inductor")
    elif config.eval.compile == "auto" and device.type == "cuda" and plain:
        side = config.data.resolution
        grey = torch.full((1, 3, side, side), 128, dtype=torch.uint8, device=device)
        try:
            model.visual = graphed(tower, chunk, grey)
            notes.append("one CUDA graph")
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            notes.append(f"no CUDA graph: {chunk} images do not fit beside it")
    return chunk, notes


@dataclass(frozen=True, kw_only=True)
class ChunkProbe:
    """Images per second by chunk size, as measured, and the chunk taken."""

    chunk: int
    rates: dict[int, float]


_PROBES: dict[tuple[str, str, str], ChunkProbe] = {}
PROBE_GAIN = 0.05  # doubling stops where it gains less
LARGEST = {"cpu": 32, "cuda": 1024}
PROBE_SHARE = 50  # a probe may cost one image in so many; it runs up to 4 * LARGEST of them


def probe_chunk(
    tower: nn.Module,
    *,
    device: torch.device,
    arch: str,
    precision: str,
    resolution: int,
    clock: Callable[[], float] = time.perf_counter,
) -> ChunkProbe:
    """The chunk of images from which on doubling gains less than 5 %, by forwards of grey images.

    Remembered by device, architecture and precision for the life of the process. Raises
    torch.OutOfMemoryError where not even one image fits.
    """
    key = (str(device), arch, precision)
    if key not in _PROBES:
        _PROBES[key] = _probe(tower, device, resolution, clock)
    return _PROBES[key]


def _probe(
    tower: nn.Module, device: torch.device, resolution: int, clock: Callable[[], float]
) -> ChunkProbe:
    rates: dict[int, float] = {}
    best = 1
    size = 1 if device.type == "cpu" else 8
    with torch.inference_mode():
        while size <= LARGEST[device.type]:
            try:
                rates[size] = _rate(tower, size, device, resolution, clock)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                torch.cuda.empty_cache()
                if rates:
                    break
                size = 1
                continue
            if rates[size] < rates.get(best, 0.0) * (1 + PROBE_GAIN) and len(rates) > 1:
                break
            best, size = size, 2 * size
    return ChunkProbe(chunk=best, rates=rates)


def _rate(
    tower: nn.Module,
    size: int,
    device: torch.device,
    resolution: int,
    clock: Callable[[], float],
) -> float:
    images = torch.full((size, 3, resolution, resolution), 128, dtype=torch.uint8, device=device)
    times = []
    for _ in range(2):
        start = clock()
        tower(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return size / max(times[-1], 1e-9)  # the first one sets things up


def prepare(
    model: nn.Module, precision: EvalPrecision, device: torch.device, *, packed: bool = False
) -> nn.Module:
    """Moves the model to the device for inference; the trunk `visual` runs in `precision`.

    The weights themselves are cast (not autocast): on a CPU that is twice as fast, and heads and
    classifiers stay in float32. packed: the trunk's large layers in the CPU's own format, which
    takes no further weights; int8 and fp8 are bf16 without it. Raises UserError for fp16 on a CPU,
    which is slower than fp32, for int8 on a GPU, and for fp8 where nothing multiplies it.
    """
    if precision == "int8" and device.type != "cpu":
        raise UserError("eval.precision=int8 is for CPUs; on a GPU use bf16 or fp8")
    if precision == "fp8":
        _check_fp8(device)
    if precision == "fp16" and device.type == "cpu":
        raise UserError("eval.precision=fp16 needs a GPU; on a CPU use bf16 or fp32")
    model = model.to(device).eval().requires_grad_(False)
    trunk = model.get_submodule("visual")
    if packed and device.type == "cpu":
        pack_tower(trunk, precision)
    elif packed and precision == "fp8":
        quantize_tower(trunk)
    trunk.to(DTYPES[precision])
    return model


def _check_fp8(device: torch.device) -> None:
    if device.type == "cpu":
        raise UserError("eval.precision=fp8 is for GPUs; on a CPU use int8 or bf16")
    if torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"eval.precision=fp8: {name} has no 8-bit floats; use bf16")


def default_chunk(device: torch.device) -> int:
    """Images per trunk forward when nothing was probed: a CPU's caches like few of them."""
    return 16 if device.type == "cpu" else 256
