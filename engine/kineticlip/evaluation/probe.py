"""How many images a forward of the trunk should have on this device, by trying."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

PROBE_GAIN = 0.05  # doubling stops where it gains less
FIRST = {"cpu": 1, "cuda": 64}  # fewer images leave most of a GPU idle
LARGEST = {"cpu": 32, "cuda": 1024}
CALLS = {"cpu": 1, "cuda": 5}  # timed, of which the median counts
PROBE_SHARE = 50  # a probe may cost one image in so many; it runs up to 4 * LARGEST of them


@dataclass(frozen=True, kw_only=True)
class ChunkProbe:
    """Images per second by chunk size, as measured, and the chunk taken."""

    chunk: int
    rates: dict[int, float]


_PROBES: dict[tuple[str, str, str], ChunkProbe] = {}


def worth_probing(images: int, device: torch.device) -> bool:
    """Whether a run over so many images earns back what a probe costs."""
    return images >= PROBE_SHARE * 4 * LARGEST[device.type]


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
    size = FIRST[device.type]
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
    for _ in range(1 + CALLS[device.type]):
        start = clock()
        tower(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return size / max(median(times[1:]), 1e-9)  # the first one sets things up
