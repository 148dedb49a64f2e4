"""The table of methods: `method` in a configuration is one of its keys."""

from __future__ import annotations

from kineticlip.methods.method import Method
from kineticlip.methods.text4vis import TEXT4VIS

METHODS: dict[str, Method] = {
    "text4vis": TEXT4VIS,
}
