"""The table of methods: `method` in a configuration is one of its keys."""

from __future__ import annotations

from kineticlip.methods import (
    actionclip,
    bike,
    contrastive,
    evl,
    openvclip,
    text4vis,
    vificlip,
    vitaclip,
    xclip,
)
from kineticlip.methods.method import Method
from kineticlip.runtime.errors import UserError, did_you_mean

METHODS: dict[str, Method] = {
    "text4vis": text4vis.METHOD,
    "contrastive": contrastive.METHOD,
    "bike": bike.METHOD,
    "evl": evl.METHOD,
    "vitaclip": vitaclip.METHOD,
    "xclip": xclip.METHOD,
    "vificlip": vificlip.METHOD,
    "actionclip": actionclip.METHOD,
    "openvclip": openvclip.METHOD,
}


def method_named(name: str) -> Method:
    """The record of a method. UserError for a name that is not in the table."""
    if name not in METHODS:
        raise UserError(f"method: unknown method '{name}'. {did_you_mean(name, METHODS)}")
    return METHODS[name]
