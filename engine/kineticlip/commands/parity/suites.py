"""Replays recorded outputs of the official codes through the engine's public path.

A suite is a package beside this file with `checks(folder) -> Iterator[Check]`; it reads every size
from the files, so any directory of the same grammar can be replayed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from kineticlip.commands.parity.check import Check, compare, exactly
from kineticlip.runtime.errors import UserError, did_you_mean

SUITES = ("text4vis", "evl", "vitaclip")

__all__ = ["SUITES", "Check", "compare", "exactly", "replay"]


def replay(method: str, folder: str | Path) -> Iterator[Check]:
    """Every comparison of one method's suite, in order, as it is made.

    Raises UserError for an unknown method, a missing folder and a missing file in it.
    """
    if method not in SUITES:
        raise UserError(f"parity: unknown method '{method}'. {did_you_mean(method, SUITES)}")
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of recorded outputs")
    suite = importlib.import_module(f"kineticlip.commands.parity.{method}")
    try:
        yield from suite.checks(root)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: missing from the recorded outputs") from None
