"""A tower made ready for the steady state: packed and 8-bit layers, compiled, or as a CUDA graph.

Shape letters: M images, N tokens, R rows of a product, D width in, F width out, H heads,
K head width. Nothing here has a gradient.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.config import Config, EvalPrecision
from kineticlip.models.vision import VisionTransformer
from kineticlip.runtime.errors import UserError

QUICK = 1.702  # quick_gelu(x) = swish(1.702 x) / 1.702, and oneDNN fuses swish into the product
ROWS = 64  # quantised at a time, in the cache; bench/cpu_choices.py
COMPILED_FROM = 5000  # images of a run, to earn back its compilation
MIDDLE = 128  # oneDNN multiplies unsigned activations: byte = round(x / scale) + 128

Fused = Literal["none", "swish", "gelu"]  # activations behind a product


class PackedLinear(nn.Module):
    """A linear layer in bf16 whose weight lies in oneDNN's own order. [..., D] -> [..., F].

    Packed once instead of in every call (bench/cpu_choices.py). The activation is part of the
    product.
    """

    def __init__(self, weight: Tensor, bias: Tensor, activation: Fused = "none") -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous())
        self.packed: Tensor = packed  # opaque: neither a parameter nor a buffer
        self.bias = bias.bfloat16()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, self.activation, [], "none"
        )
        return out


class ByteLinear(nn.Module):
    """A linear layer on bytes: a scale for each row of x and of the weight. [..., D] -> [..., F].

    x bf16 is quantised on the way in (symmetric, by its row's largest magnitude / 127), products
    are exact in int32, and the sum leaves in bf16.
    """

    def __init__(self, weight: Tensor, bias: Tensor, activation: Fused = "none") -> None:
        super().__init__()
        scale = weight.float().abs().amax(dim=1).clamp_min(1e-12) / 127  # [F]
        values = (weight.float() / scale[:, None]).round().to(torch.int8)  # [F, D]
        packed = torch.ops.onednn.qlinear_prepack(values, None)
        self.packed: Tensor = packed
        # Plain attributes: a cast of the model to bf16 must leave the scales alone.
        self.scale, self.offset = scale, torch.zeros(len(weight), dtype=torch.int32)
        self.bias, self.activation = bias.bfloat16(), activation
        self.quantise: Callable[[Tensor], tuple[Tensor, Tensor]] = quantise_rows

    def forward(self, x: Tensor) -> Tensor:
        values, scale = self.quantise(x.flatten(0, -2))  # [R, D], [R, 1]
        out = self.product(values)  # [R, F]
        # In place: new memory of this size has to be mapped page by page.
        torch.addcmul(self.bias, out, scale.bfloat16(), out=out)
        if self.activation == "swish":
            out = F.silu(out, inplace=True)
        elif self.activation == "gelu":
            out = F.gelu(out)
        result: Tensor = out.unflatten(0, x.shape[:-1])
        return result

    def product(self, values: Tensor) -> Tensor:
        """Bytes uint8 [R, D] around 128 -> bf16 [R, F], without the scales of the rows."""
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            values, 1.0, MIDDLE, self.packed, self.scale, self.offset, None, 1.0, 0,
            torch.bfloat16, "none", [], "",
        )  # fmt: skip
        return out


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, D] -> bytes uint8 [R, D] around 128, and scales float32 [R, 1]."""
    values = torch.empty(x.shape, dtype=torch.uint8)
    scale = torch.empty(len(x), 1)
    for start in range(0, len(x), ROWS):
        rows = x[start : start + ROWS].float()
        part = rows.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-12).div_(127)
        scale[start : start + ROWS] = part
        # By way of int32: the conversion of floats to bytes is not vectorised.
        values[start : start + ROWS] = rows.div_(part).round_().add_(MIDDLE).int()
    return values, scale


def fused_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """quantise_rows as one loop, for a compiler."""
    rows = x.float()
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    return ((rows / scale).round() + MIDDLE).to(torch.uint8), scale


def compile_bytes(tower: nn.Module, *, backend: str = "inductor") -> None:
    """Has the quantisation before a tower's int8 products compiled when it first runs.

    One loop over a row instead of several (bench/cpu_choices.py).
    """
    quantise = torch.compile(fused_quantise, dynamic=True, backend=backend)
    for layer in tower.modules():
        if isinstance(layer, ByteLinear):
            layer.quantise = quantise


def pack_tower(tower: nn.Module, precision: EvalPrecision) -> int:
    """Puts packed (bf16) or byte (int8) layers in place of a transformer tower's large ones.

    To be called with float32 weights, which are rounded once. The factors of QuickGELU move into
    the weights around it. Gives the number of layers; 0 where there is nothing to pack: a ResNet,
    another precision, a CPU without bf16 instructions. Raises UserError where int8 cannot run.
    """
    if precision == "int8":
        if "onednn" not in torch.backends.quantized.supported_engines:
            raise UserError("eval.precision=int8 needs a PyTorch with oneDNN")
        if not isinstance(tower, VisionTransformer):
            raise UserError("eval.precision=int8 is for transformers, not for a ResNet")
    elif (
        precision != "bf16"
        or not isinstance(tower, VisionTransformer)
        or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return 0
    kind = ByteLinear if precision == "int8" else PackedLinear
    for block in tower.blocks:
        attention, mlp = cast(Any, block.attn), cast(Any, block.mlp)
        out, first, second = attention.out_proj, mlp.c_fc, mlp.c_proj
        attention.packed = kind(attention.in_proj_weight, attention.in_proj_bias)
        attention.out_proj = kind(out.weight, out.bias)
        if first.activation == "quick_gelu":
            mlp.c_fc = kind(first.weight * QUICK, first.bias * QUICK, "swish")
            mlp.c_proj = kind(second.weight / QUICK, second.bias)
        else:
            mlp.c_fc = kind(first.weight, first.bias, "gelu")
            mlp.c_proj = kind(second.weight, second.bias)
    return 4 * len(tower.blocks)


class SteadyTower(nn.Module):
    """A tower behind one batch shape: a chunk that is not full is filled up and cut again.

    Chunks less than half full, calls with hooks (sources, taps, offsets) and other inputs than
    bytes go to the tower itself, and so does every attribute, so that methods reach into it as
    ever. `run` maps pixels [chunk, 3, S, S] to embeddings, which its next call may overwrite.
    """

    def __init__(self, tower: nn.Module, run: Callable[[Tensor], Tensor], chunk: int) -> None:
        super().__init__()
        self.tower, self.chunk = tower, chunk
        self._run = run

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("tower"), name)

    def forward(self, pixels: Tensor, **hooks: Any) -> Tensor:
        """[M, 3, S, S] -> [M, E]."""
        if (
            hooks
            or pixels.dtype != torch.uint8
            or not self.chunk < 2 * len(pixels) <= 2 * self.chunk
        ):
            out: Tensor = self.tower(pixels, **hooks)
            return out
        missing = self.chunk - len(pixels)
        filled = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
        return self._run(filled)[: len(pixels)].clone()


def compiled(tower: nn.Module, chunk: int, *, backend: str = "inductor") -> SteadyTower:
    """The tower through Inductor for chunks of exactly `chunk` images; compiled when first called.

    On a CPU the weights are frozen into the code, which lets Inductor pack them.
    """
    from torch._inductor import config as inductor

    run = torch.compile(tower, dynamic=False, backend=backend)

    def frozen(pixels: Tensor) -> Tensor:
        # Freezing looks at parameters without gradients and needs grad mode to be off.
        with inductor.patch(freezing=pixels.device.type == "cpu"), torch.no_grad():
            out: Tensor = run(pixels)
            return out

    return SteadyTower(tower, frozen, chunk)


def graphed(tower: nn.Module, chunk: int, pixels: Tensor) -> SteadyTower:
    """The tower as one CUDA graph for chunks of `chunk` images like `pixels` [1, 3, S, S].

    A graph replays every launch of a forward at once, so the host has nothing to keep up with.
    """
    device = pixels.device
    inputs = pixels[:1].expand(chunk, -1, -1, -1).clone()
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside), torch.inference_mode():
        for _ in range(3):  # autotuning and lazy set-up must not happen while recording
            tower(inputs)
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Threads that decode meanwhile may allocate and wait: only this one must not.
    recording = torch.cuda.graph(graph, capture_error_mode="thread_local")
    with recording, torch.inference_mode():
        outputs = tower(inputs)

    def replay(filled: Tensor) -> Tensor:
        inputs.copy_(filled)
        graph.replay()
        result: Tensor = outputs
        return result

    return SteadyTower(tower, replay, chunk)


def make_steady(
    model: nn.Module, config: Config, *, device: torch.device, chunk: int, images: int
) -> tuple[int, list[str]]:
    """Readies `model.visual` for about `images` images; (images per forward, what was chosen).

    The chunk is probed where it is not given, batch shapes may vary and the run is long enough.
    eval.compile: auto records a CUDA graph on a GPU and leaves the packed layers of a CPU alone,
    which cost no compilation; always compiles for either; never does neither. int8 has its
    quantisation compiled: by `always`, and by `auto` in runs that are long enough to earn it back.
    """
    tower = model.get_submodule("visual")
    notes = [f"{config.eval.precision} on {device.type}"]
    # Methods that reach into the tower, or show it whole clips, would not use the result.
    plain = getattr(model, "per_clip", True) is False and isinstance(tower, VisionTransformer)
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
            config.eval.compile == "auto" and not fixed and images >= COMPILED_FROM and _compiler()
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


def _compiler() -> bool:
    """Whether Inductor finds the C++ compiler and the Python headers that it needs for a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return Path(sysconfig.get_path("include"), "Python.h").exists()


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
