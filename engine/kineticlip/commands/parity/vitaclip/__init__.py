"""Outputs of the official Vita-CLIP code, replayed: see the README beside them for the grammar."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from kineticlip.commands.parity.check import Check, attempt
from kineticlip.commands.parity.vitaclip.data import data_checks
from kineticlip.commands.parity.vitaclip.golden import Golden
from kineticlip.commands.parity.vitaclip.scoring import (
    frame_mismatch,
    published_layout,
    text_variants,
    tokens,
    trace,
    vision_variants,
    zero_shot,
)
from kineticlip.commands.parity.vitaclip.training import gradients, main_run, three_steps


def checks(folder: Path) -> Iterator[Check]:
    """Every comparison of one directory."""
    with tempfile.TemporaryDirectory() as scratch:
        golden = Golden.read(folder, Path(scratch))
        for part in (
            tokens,
            text_variants,
            vision_variants,
            trace,
            frame_mismatch,
            zero_shot,
            gradients,
            three_steps,
            main_run,
        ):
            yield from attempt(part.__name__, part(golden))
    yield from attempt("data", data_checks(folder))
    if (folder / "vitb16_keys.json").is_file():
        yield from attempt("layout", published_layout(folder))
