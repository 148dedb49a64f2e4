"""The table of methods: `method` in a configuration is one of its keys."""

from __future__ import annotations

from kineticlip.methods.actionclip import ACTIONCLIP
from kineticlip.methods.bike import BIKE
from kineticlip.methods.contrastive import CONTRASTIVE
from kineticlip.methods.evl import EVL_METHOD
from kineticlip.methods.method import Method
from kineticlip.methods.openvclip import OPENVCLIP
from kineticlip.methods.text4vis import TEXT4VIS
from kineticlip.methods.vificlip import VIFICLIP
from kineticlip.methods.vitaclip import VITACLIP
from kineticlip.methods.xclip import XCLIP_METHOD
from kineticlip.runtime.errors import UserError, did_you_mean

METHODS: dict[str, Method] = {
    "text4vis": TEXT4VIS,
    "contrastive": CONTRASTIVE,
    "bike": BIKE,
    "evl": EVL_METHOD,
    "vitaclip": VITACLIP,
    "xclip": XCLIP_METHOD,
    "vificlip": VIFICLIP,
    "actionclip": ACTIONCLIP,
    "openvclip": OPENVCLIP,
}


def method_named(name: str) -> Method:
    """The record of a method. UserError for a name that is not in the table."""
    if name not in METHODS:
        raise UserError(f"method: unknown method '{name}'. {did_you_mean(name, METHODS)}")
    return METHODS[name]
