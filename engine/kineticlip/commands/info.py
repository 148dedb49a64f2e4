"""`kineticlip info CONFIG`: parameters and multiply-adds of a configuration, part by part."""

from __future__ import annotations

import argparse
import json
from typing import Any

from kineticlip.config import Config, load_config
from kineticlip.runtime.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a YAML file, an official one included, or the name of a recipe",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key of the configuration; repeatable",
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
    from kineticlip.methods import method_named
    from kineticlip.models.architectures import architecture
    from kineticlip.models.cost import totals

    method = method_named(config.method)
    model = architecture(config.model.arch)
    if model.vision.resolution != config.data.resolution:
        raise UserError(
            f"data.resolution: {model.name} takes {model.vision.resolution} px, "
            f"not {config.data.resolution}"
        )
    parts = method.cost(config, model, classes)
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
