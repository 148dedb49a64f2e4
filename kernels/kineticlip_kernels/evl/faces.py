"""The faces of EVL's ops: as everywhere, and "lean"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from kineticlip_kernels.dispatch import choose

EvlImpl = Literal["auto", "reference", "lean", "triton"]
FACES = get_args(EvlImpl)


def choose_face(op: str, impl: EvlImpl, why_not: Sequence[str]) -> str:
    return choose(op, impl, why_not, slow="lean", known=FACES)
