"""A model made ready to score: precision, packed layers, chunk size, compilation, CUDA graph."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

from kineticlip.config import EIGHT_BITS, Config, EvalPrecision
from kineticlip.evaluation.probe import probe_chunk, worth_probing
from kineticlip.methods.method import as_video_model
from kineticlip.models.fp8 import quantize_tower
from kineticlip.models.packed import compile_bytes, pack_tower
from kineticlip.models.steady import SteadyTower, compiled, graphed
from kineticlip.models.vision import VisionTransformer
from kineticlip.runtime.compiler import why_no_compiler
from kineticlip.runtime.distributed import full_precision_products
from kineticlip.runtime.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES["int8"] = DTYPES["fp8"] = torch.bfloat16  # of everything but the tower's products
COMPILED_FROM = 5000  # images of a run, to earn back its compilation


@dataclass(frozen=True, kw_only=True)
class ReadyModel:
    """A model ready to score, and how it should be run.

    chunk: images per forward of its trunk. notes: what was chosen, for people. reference: the
    same model in bf16, to compare, where it was asked for and the precision has 8 bits.
    """

    model: nn.Module
    device: torch.device
    chunk: int
    notes: tuple[str, ...] = ()
    reference: nn.Module | None = None


def ready(
    model: nn.Module,
    config: Config,
    *,
    device: torch.device,
    packed: bool = True,
    with_reference: bool = False,
) -> ReadyModel:
    """Moves the model to the device for inference; its trunk `visual` runs in eval.precision.

    The weights themselves are cast (not autocast): on a CPU that is twice as fast, and heads and
    classifiers stay in float32. packed: the trunk's large layers in the CPU's own format or in 8
    bits on a GPU, which takes no further weights; int8 and fp8 are bf16 without it. Where
    eval.compile is `always`, Inductor packs by itself. with_reference: of a model in 8 bits keep
    the one in bf16 too.

    Raises UserError for fp16 on a CPU, which is slower than fp32, for int8 on a GPU, and for fp8
    where nothing multiplies it.
    """
    precision = config.eval.precision
    _check_precision(precision, device)
    full_precision_products()
    reference = None
    if precision in EIGHT_BITS and with_reference:
        reference = _for_inference(copy.deepcopy(model), device)
        reference.get_submodule("visual").to(torch.bfloat16)
    model = _for_inference(model, device)
    trunk = model.get_submodule("visual")
    notes = [f"{precision} on {device.type}"]
    inductor_packs = config.eval.compile == "always" and precision not in EIGHT_BITS
    if packed and not inductor_packs and _pack(trunk, precision, device):
        notes.append("layers packed by oneDNN")
    trunk.to(DTYPES[precision])
    return ReadyModel(
        model=model,
        device=device,
        chunk=config.eval.batch_frames or default_chunk(device),
        notes=tuple(notes),
        reference=reference,
    )


def ready_for_run(found: ReadyModel, config: Config, *, images: int) -> ReadyModel:
    """The model of `ready` in the steady state of a run of about `images` images.

    The chunk is probed where it is not given, batch shapes may vary and the run is long enough.
    eval.compile: auto records a CUDA graph on a GPU and leaves the packed layers of a CPU alone,
    which cost no compilation; always compiles for either; never does neither. int8 has its
    quantisation compiled: by `always`, and by `auto` in runs that are long enough to earn it back.
    Raises UserError where `always` finds no compiler, or a method that it cannot compile.
    """
    if config.eval.compile == "always" and (reason := why_no_compiler()):
        raise UserError(f"eval.compile=always: {reason}; or take eval.compile=never")
    tower = found.model.get_submodule("visual")
    if isinstance(tower, SteadyTower):  # of an earlier run with the same model
        found.model.visual = tower.tower
    found = _with_probed_chunk(found, config, images)
    if config.eval.precision == "int8":
        return _with_compiled_bytes(found, config, images)
    if config.eval.compile == "always":
        return _with_compiled_tower(found)
    if config.eval.compile == "auto" and found.device.type == "cuda" and _encodes_images(found):
        return _with_graph(found, config.data.resolution)
    return found


def default_chunk(device: torch.device) -> int:
    """Images per trunk forward when nothing was probed: a CPU's caches like few of them."""
    return 16 if device.type == "cpu" else 256


def _check_precision(precision: EvalPrecision, device: torch.device) -> None:
    """Raises UserError, with what to use instead, where the device cannot run this precision."""
    if precision == "int8" and device.type != "cpu":
        raise UserError("eval.precision=int8 is for CPUs; on a GPU use bf16 or fp8")
    if precision == "fp16" and device.type == "cpu":
        raise UserError("eval.precision=fp16 needs a GPU; on a CPU use bf16 or fp32")
    if precision != "fp8":
        return
    if device.type == "cpu":
        raise UserError("eval.precision=fp8 is for GPUs; on a CPU use int8 or bf16")
    if torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"eval.precision=fp8: {name} has no 8-bit floats; use bf16")


def _for_inference(model: nn.Module, device: torch.device) -> nn.Module:
    return model.to(device).eval().requires_grad_(False)


def _pack(trunk: nn.Module, precision: EvalPrecision, device: torch.device) -> bool:
    """Puts faster layers in place of the trunk's large ones; whether they are oneDNN's."""
    if device.type == "cpu":
        return pack_tower(trunk, precision) > 0
    if precision == "fp8":
        quantize_tower(trunk)
    return False


def _encodes_images(found: ReadyModel) -> bool:
    """Whether a plain ViT is shown single images, and its method does not reach into it."""
    model = as_video_model(found.model)
    return model.plain_tower and isinstance(model.visual, VisionTransformer)


def _fixed_shapes(config: Config) -> bool:
    """Whether the batch shapes of a run are given, or must not depend on measurements."""
    return bool(config.eval.batch_frames) or config.eval.deterministic


def _noted(found: ReadyModel, note: str) -> ReadyModel:
    return replace(found, notes=(*found.notes, note))


def _with_probed_chunk(found: ReadyModel, config: Config, images: int) -> ReadyModel:
    if _fixed_shapes(config) or not _encodes_images(found):
        return found
    if not worth_probing(images, found.device):
        return found
    probe = probe_chunk(
        found.model.get_submodule("visual"),
        device=found.device,
        arch=config.model.arch,
        precision=config.eval.precision,
        resolution=config.data.resolution,
    )
    first, *others = found.notes
    note = f"chunk probed: {probe.chunk} at {probe.rates[probe.chunk]:.1f} images/s"
    return replace(found, chunk=probe.chunk, notes=(first, note, *others))


def _with_compiled_bytes(found: ReadyModel, config: Config, images: int) -> ReadyModel:
    always, auto = config.eval.compile == "always", config.eval.compile == "auto"
    long = not _fixed_shapes(config) and images >= COMPILED_FROM
    if not (always or (auto and long and not why_no_compiler())):
        return found
    compile_bytes(found.model.get_submodule("visual"))
    return _noted(found, "quantisation compiled by Inductor")


def _with_compiled_tower(found: ReadyModel) -> ReadyModel:
    if not _encodes_images(found):
        raise UserError(
            "eval.compile=always: only for methods that encode single images by a plain ViT"
        )
    found.model.visual = compiled(found.model.get_submodule("visual"), found.chunk)
    return _noted(found, "compiled by Inductor")


def _with_graph(found: ReadyModel, resolution: int) -> ReadyModel:
    side, chunk = resolution, found.chunk
    grey = torch.full((1, 3, side, side), 128, dtype=torch.uint8, device=found.device)
    try:
        found.model.visual = graphed(found.model.get_submodule("visual"), chunk, grey)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return _noted(found, f"no CUDA graph: {chunk} images do not fit beside it")
    return _noted(found, "one CUDA graph")
