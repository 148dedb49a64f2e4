"""What the ratios of end_to_end.py could reach: the matrix products alone, at measured peak speed.

Everything but products of matrices is taken to cost nothing, so no program that multiplies the
same matrices on this machine gets past these ceilings.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from kineticlip.models.architectures import VisionShape, architecture
from kineticlip.models.packed import ByteLinear, PackedLinear

ROWS = 3152  # of the timed product: 16 images of ViT-B/16
REPEATS = 4


@dataclass(frozen=True)
class Products:
    """GFLOP of one image."""

    weights: float
    attention: float


@dataclass
class Limits:
    """Collects the speed of products over a run, and compares a baseline's time with it."""

    arch: str
    resolution: int
    naive_images: int
    rates: dict[str, float] = field(default_factory=dict)  # GFLOP/s by precision, the best

    @property
    def shape(self) -> tuple[int, int]:
        """Width in and out of the widest layer."""
        shape = architecture(self.arch).vision
        return shape.width, 4 * shape.width

    def add(self, rates: dict[str, float]) -> None:
        for name, rate in rates.items():
            self.rates[name] = max(self.rates.get(name, 0.0), rate)

    def products(self, *, class_only: bool) -> Products:
        """Of one image; class_only: the last block computes the class token alone."""
        shape = architecture(self.arch).vision
        assert isinstance(shape, VisionShape)
        patches = (self.resolution // shape.patch) ** 2
        tokens, width = patches + 1, shape.width
        layers = shape.layers - class_only
        embedding = 2 * patches * 3 * shape.patch**2 * width
        weights = layers * 2 * tokens * 12 * width**2 + embedding
        return Products(weights / 1e9, layers * 4 * tokens**2 * width / 1e9)

    def record(self, naive_seconds: float, engine_images: int) -> dict[str, Any]:
        """naive_seconds: of the fp32 baseline, in the time that the rates were measured in."""
        naive, engine = self.products(class_only=False), self.products(class_only=True)
        done = self.naive_images * (naive.weights + naive.attention)
        share = 100 * done / self.rates["fp32"] / naive_seconds
        ceilings = {}
        for name, rate in self.rates.items():
            other = self.rates["bf16" if name == "int8" else name]  # attention is never int8
            least = engine_images * (engine.weights / rate + engine.attention / other)
            ceilings[name] = round(naive_seconds / least, 2)
        speeds = ", ".join(f"{name} {rate:.0f}" for name, rate in self.rates.items())
        reached = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ceilings.items())
        return {
            "gflops": {name: round(rate, 1) for name, rate in self.rates.items()},
            "naive_gflop": round(done, 1),
            "engine_gflop": round(engine_images * (engine.weights + engine.attention), 1),
            "naive_seconds": round(naive_seconds, 3),
            "product_percent_of_naive": round(share, 1),
            "ceiling": ceilings,
            "text": f"products at {speeds} GFLOP/s; {share:.0f} % of the fp32 baseline's time is "
            f"products at full speed; with nothing but products the ratios would be {reached}",
        }


def product_rates(shape: tuple[int, int], device: torch.device) -> dict[str, float]:
    """GFLOP/s of the widest layer by precision: per second on a GPU, per CPU second on a CPU."""
    width, out = shape
    rows = ROWS if device.type == "cpu" else 16 * ROWS
    x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.zeros(out)
    with torch.inference_mode():
        if device.type == "cuda":
            calls = {
                name: (F.linear, x.to(device, kind), weight.to(device, kind))
                for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16))
            }
            return {name: _rate(run, *given) for name, (run, *given) in calls.items()}
        rates = {"fp32": _rate(F.linear, x, weight)}
        rates["bf16"] = _rate(PackedLinear(weight, bias), x.bfloat16())
        values = torch.randint(0, 255, (rows, width), dtype=torch.uint8)
        rates["int8"] = _rate(ByteLinear(weight, bias).product, values)
    return rates


def _rate(run: Any, *given: torch.Tensor) -> float:
    clock = time.perf_counter if given[0].is_cuda else time.process_time
    spans = []
    for _ in range(REPEATS):
        start = clock()
        out = run(*given)
        if out.is_cuda:
            torch.cuda.synchronize()
        spans.append(clock() - start)
    return float(2e-9 * given[0].shape[0] * given[0].shape[1] * out.shape[1] / min(spans[1:]))
