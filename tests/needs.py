"""Optional parts of the machine that single tests need, and what to install for each."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@functools.cache
def torchcodec() -> str:
    """Why torchcodec cannot decode here, with what to install; "" where it can."""
    from kineticlip.video import torchcodec
    from kineticlip.video.container import Unsuitable

    try:
        torchcodec.load()
    except Unsuitable as error:
        return str(error)
    return ""


@functools.cache
def compiler() -> str:
    """Why Inductor cannot compile for this CPU, with what to install; "" where it can."""
    from kineticlip.runtime.compiler import why_no_compiler

    return why_no_compiler()


def browser() -> str:
    """The path of a Chromium; "" where there is none."""
    return next(filter(None, map(shutil.which, CHROMIUM)), "")


def chromium() -> str:
    """Why no page can be opened in a browser, with what to install; "" where one can."""
    return "" if browser() else "no chromium: install the package chromium"


# By marker: @pytest.mark.needs_torchcodec skips its test where `torchcodec()` gives a reason.
NEEDS: dict[str, Callable[[], str]] = {
    "needs_torchcodec": torchcodec,
    "needs_compiler": compiler,
    "needs_chromium": chromium,
}
