"""KinetiCLIP: CLIP as a video recogniser, from file to score.

    import kineticlip

    recognizer = kineticlip.load("ViT-B-16", labels=["archery", "bowling", "juggling"])
    print(recognizer.predict("clip.mp4").ranking[0])

Every name below is imported when it is first used: `import kineticlip` alone loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kineticlip.runtime.version import __version__

if TYPE_CHECKING:
    from kineticlip.config import Config, load_config
    from kineticlip.evaluation.front import evaluate, load
    from kineticlip.evaluation.recognizer import Prediction, Recognizer
    from kineticlip.methods import METHODS
    from kineticlip.runtime.errors import UserError
    from kineticlip.video import VideoError, open_video

__all__ = [
    "METHODS",
    "Config",
    "Prediction",
    "Recognizer",
    "UserError",
    "VideoError",
    "__version__",
    "evaluate",
    "load",
    "load_config",
    "open_video",
]

_HOMES = {
    "Config": "kineticlip.config",
    "load_config": "kineticlip.config",
    "evaluate": "kineticlip.evaluation.front",
    "load": "kineticlip.evaluation.front",
    "Prediction": "kineticlip.evaluation.recognizer",
    "Recognizer": "kineticlip.evaluation.recognizer",
    "METHODS": "kineticlip.methods",
    "UserError": "kineticlip.runtime.errors",
    "VideoError": "kineticlip.video",
    "open_video": "kineticlip.video",
}


if not TYPE_CHECKING:  # or every misspelt name would be an Any to type checkers

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
