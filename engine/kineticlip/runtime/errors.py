"""What a user did wrong, said in one line; everything else keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the caller: what is wrong, where, and what would be right.

    The command line prints it as one line on stderr and exits with status 2.
    """


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A closing hint for an unknown name: the nearest choice, or the choices when none is near."""
    known = sorted(choices)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"Did you mean '{near[0]}'?"
    return f"Known: {', '.join(known)}" if known else ""
