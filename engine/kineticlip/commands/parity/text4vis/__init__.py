"""Text4Vis and BIKE: every recorded file, replayed through the engine's public path.

Sizes, cases, runs and seeds are read from the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from kineticlip.commands.parity.check import Check, attempt
from kineticlip.commands.parity.text4vis.bike import bike_checks
from kineticlip.commands.parity.text4vis.data import (
    augmentation_checks,
    bike_sampler_checks,
    crop_checks,
    few_shot_checks,
    sampler_checks,
    token_checks,
)
from kineticlip.commands.parity.text4vis.files import Golden
from kineticlip.commands.parity.text4vis.metrics import (
    map_checks,
    multilabel_checks,
    zero_shot_checks,
)
from kineticlip.commands.parity.text4vis.models import (
    cases,
    checkpoint_checks,
    header_checks,
    model_checks,
    rounding_checks,
    text_checks,
)
from kineticlip.commands.parity.text4vis.nce import nce_checks
from kineticlip.commands.parity.text4vis.training import loop_checks, rate_checks
from kineticlip.commands.parity.text4vis.views import multiview_checks

Part = Callable[[Golden], Iterator[Check]]

PARTS: dict[str, Part] = {
    "text": text_checks,
    "header": header_checks,
    "rounding": rounding_checks,
    "bike": bike_checks,
    "multiview": multiview_checks,
    "sampler": sampler_checks,
    "bike_sampler": bike_sampler_checks,
    "crops": crop_checks,
    "augmentation": augmentation_checks,
    "zeroshot": zero_shot_checks,
    "map": map_checks,
    "map_multilabel": multilabel_checks,
    "tokens": token_checks,
    "fewshot": few_shot_checks,
    "rates": rate_checks,
    "nce": nce_checks,
    "train": loop_checks,
}

APART = ("nce", "train")  # they wait for processes of their own, and run beside the others


def parts(golden: Golden) -> dict[str, Part]:
    """What there is to replay in a folder, by name: its model cases, then PARTS."""
    every: dict[str, Part] = {}
    for case in cases(golden):
        every[case] = partial(model_checks, case=case)
        every[f"checkpoint/{case}"] = partial(checkpoint_checks, case=case)
    return every | PARTS


def checks(folder: Path) -> Iterator[Check]:
    """Every comparison over a folder of recorded outputs, as it is made, those of APART last."""
    golden = Golden(folder)
    every = parts(golden)
    with ThreadPoolExecutor(1) as beside:
        waiting = [
            beside.submit(
                lambda name, part: list(attempt(name, part(golden))), name, every.pop(name)
            )
            for name in APART
            if name in every
        ]
        for name, part in every.items():
            yield from attempt(name, part(golden))
        for future in waiting:
            yield from future.result()
