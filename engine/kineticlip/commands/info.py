"""`kineticlip info CONFIG`: parameters and multiply-adds of a configuration, part by part."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kineticlip.config import Config, load_config
from kineticlip.runtime.errors import UserError

if TYPE_CHECKING:
    from kineticlip.models.architectures import Architecture
    from kineticlip.models.cost import Part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, ours or an official one")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one value of the configuration",
    )
    parser.add_argument(
        "--classes", type=int, default=400, metavar="C", help="number of classes (default 400)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    report = describe(config, args.classes)
    print(json.dumps(report) if args.json else _as_text(report))
    return 0


def describe(config: Config, classes: int) -> dict[str, Any]:
    """Everything the command prints, as plain data; multiply-adds as whole numbers."""
    from kineticlip.models.architectures import architecture
    from kineticlip.models.cost import totals

    if config.method not in PARTS:
        known = ", ".join(PARTS)
        raise UserError(f"method: no counts for '{config.method}'; known: {known}")
    model = architecture(config.model.arch)
    if model.vision.resolution != config.data.resolution:
        raise UserError(
            f"data.resolution: {model.name} takes {model.vision.resolution} px, "
            f"not {config.data.resolution}"
        )
    parts = PARTS[config.method](config, model, classes)
    views = config.test.clips * config.test.crops
    return {
        "name": config.name,
        "method": config.method,
        "arch": model.name,
        "frames": config.data.num_frames,
        "resolution": config.data.resolution,
        "views": views,
        "parts": [part.__dict__ for part in parts],
        "totals": totals(parts).__dict__,
        "text": [part.__dict__ for part in parts if part.once],
    }


def _text4vis(config: Config, model: Architecture, classes: int) -> list[Part]:
    from kineticlip.methods.cost import text4vis
    from kineticlip.models.cost import text

    layers = config.text4vis.header_layers if config.text4vis.header == "transformer" else 0
    tower = text(model.text, classes)
    return [*text4vis(model, config.data.num_frames, header_layers=layers), tower]


def _contrastive(config: Config, model: Architecture, classes: int) -> list[Part]:
    """Text4Vis's parts; which towers train is the configuration's choice."""

    def trains(part: Part) -> bool:
        if part.once:
            return config.contrastive.text == "online"
        return config.contrastive.train_visual or not part.name.startswith("visual")

    return [
        replace(part, trained=part.parameters if trains(part) else 0)
        for part in _text4vis(config, model, classes)
    ]


def _evl(config: Config, model: Architecture, classes: int) -> list[Part]:
    from kineticlip.methods.cost import evl
    from kineticlip.methods.evl_decoder import decoder_shape
    from kineticlip.models.architectures import VisionShape

    if not isinstance(model.vision, VisionShape):
        raise UserError(f"model.arch: EVL reads a vision transformer, {model.name} is none")
    shape = decoder_shape(config.evl, model.vision, config.data.num_frames)
    parts = evl(
        model.vision,
        shape.frames,
        classes=classes,
        layers=shape.layers,
        qkv_dim=shape.qkv_dim,
        heads=shape.heads,
        mlp_factor=config.evl.mlp_factor,
        temporal_conv=shape.conv,
        temporal_positions=shape.position,
        temporal_attention=shape.attention,
    )
    if not config.evl.finetune:
        return parts
    return [
        replace(part, trained=part.parameters) if part.name.startswith("visual") else part
        for part in parts
    ]


def _vitaclip(config: Config, model: Architecture, classes: int) -> list[Part]:
    from kineticlip.methods.cost import vitaclip
    from kineticlip.models.architectures import VisionShape

    if not isinstance(model.vision, VisionShape):
        raise UserError(f"model.arch: {model.name} is a ResNet; it takes no prompts")
    options = config.vitaclip
    parts = vitaclip(
        model,
        config.data.num_frames,
        classes=classes,
        summary=options.summary,
        local=options.local_prompts,
        global_prompts=options.global_prompts,
        context=len(options.context_words.split()) or options.context,
        per_class=options.per_class and not options.context_words,
        train_cls_proj=options.train_cls_proj,
    )
    return [part for part in parts if options.text == "prompts" or part.name != "text prompts"]


def _vificlip(config: Config, model: Architecture, classes: int) -> list[Part]:
    """CLIP's towers and nothing else; which of them train is the configuration's choice."""
    from kineticlip.methods.cost import text4vis
    from kineticlip.models.cost import text

    def trains(part: Part) -> bool:
        return config.vificlip.train_text if part.once else config.vificlip.train_visual

    parts = [*text4vis(model, config.data.num_frames, header_layers=0), text(model.text, classes)]
    return [replace(part, trained=part.parameters if trains(part) else 0) for part in parts]


def _actionclip(config: Config, model: Architecture, classes: int) -> list[Part]:
    """Text4Vis's parts; the text tower trains too, and reads every class in every template."""
    from kineticlip.models.cost import text
    from kineticlip.models.prompts import expand_templates

    sentences = classes * len(expand_templates(config.actionclip.templates))
    tower = text(model.text, sentences)
    trained = tower.parameters if config.actionclip.train_text else 0
    return [*_text4vis(config, model, classes)[:-1], replace(tower, trained=trained)]


def _vit_of(model: Architecture, method: str) -> None:
    from kineticlip.models.architectures import VisionShape

    if not isinstance(model.vision, VisionShape):
        raise UserError(f"model.arch: {model.name} is a ResNet; {method} needs a ViT")


def _xclip(config: Config, model: Architecture, classes: int) -> list[Part]:
    from kineticlip.methods.cost import xclip

    _vit_of(model, "X-CLIP")
    return xclip(
        model,
        config.data.num_frames,
        classes=classes,
        integration_layers=config.xclip.integration_layers,
        prompt_layers=config.xclip.prompt_layers,
        train_text=config.xclip.train_text,
    )


def _openvclip(config: Config, model: Architecture, classes: int) -> list[Part]:
    from kineticlip.methods.cost import openvclip
    from kineticlip.models.prompts import expand_templates

    _vit_of(model, "Open-VCLIP")
    options = config.classifier
    templates = expand_templates(options.templates or (options.template,))
    return openvclip(model, config.data.num_frames, sentences=classes * len(templates))


# method -> its parts for a configuration, an architecture and a number of classes
PARTS: dict[str, Callable[[Config, Architecture, int], list[Part]]] = {
    "text4vis": _text4vis,
    "contrastive": _contrastive,
    "bike": _text4vis,
    "evl": _evl,
    "vitaclip": _vitaclip,
    "vificlip": _vificlip,
    "actionclip": _actionclip,
    "xclip": _xclip,
    "openvclip": _openvclip,
}


def _as_text(report: dict[str, Any]) -> str:
    head = f"{report['name']}: {report['method']}, {report['arch']}"
    lines = [
        f"{head}, {report['frames']} frames at {report['resolution']} px",
        "",
        f"{'':44}{'parameters':>14}{'GMAC official':>15}{'GMAC ours':>12}{'paper':>7}",
    ]
    for part in report["parts"]:
        counted = "yes" if part["in_paper"] else ""
        name = part["name"] + (" (once)" if part["once"] else "")
        lines.append(
            f"  {name:42}{part['parameters']:14,}{_giga(part['official']):>15}"
            f"{_giga(part['ours']):>12}{counted:>7}"
        )
    total = report["totals"]
    lines += [
        f"  {'one clip':42}{total['parameters']:14,}{_giga(total['official']):>15}"
        f"{_giga(total['ours']):>12}",
        "",
        f"trained: {total['trained']:,} parameters",
        f"as the paper counts: {_giga(total['paper'])} GMAC, "
        f"{total['paper_parameters'] / 1e6:.1f} M parameters",
        f"one video of {report['views']} views: {_giga(total['ours'] * report['views'])} GMAC "
        f"({_giga(total['official'] * report['views'])} official); views share equal images",
    ]
    return "\n".join(lines)


def _giga(macs: int) -> str:
    return f"{macs / 1e9:,.2f}" if macs else ""
