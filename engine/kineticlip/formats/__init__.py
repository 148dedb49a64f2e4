"""Checkpoints of every known code base, in and out, under one set of names."""

from kineticlip.formats.convert import Conversion, convert, save_checkpoint
from kineticlip.formats.load import (
    Checkpoint,
    Loaded,
    clip_part,
    interpolate_positions,
    load_clip_state,
    load_into,
    read_checkpoint,
    round_like_clip,
)
from kineticlip.formats.names import fold_patch_bias
from kineticlip.formats.optimiser import OptimiserState, read_optimiser
from kineticlip.formats.table import FORMATS, Format
from kineticlip.formats.targets import TARGETS, Target

__all__ = [
    "FORMATS",
    "TARGETS",
    "Checkpoint",
    "Conversion",
    "Format",
    "Loaded",
    "OptimiserState",
    "Target",
    "clip_part",
    "convert",
    "fold_patch_bias",
    "interpolate_positions",
    "load_clip_state",
    "load_into",
    "read_checkpoint",
    "read_optimiser",
    "round_like_clip",
    "save_checkpoint",
]
