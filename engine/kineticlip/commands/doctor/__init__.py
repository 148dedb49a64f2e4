"""`kineticlip doctor`: what of this machine the engine uses, which face of every op, and why."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Callable
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default auto)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="bf16",
        help="of the tensors that the ops are tried with (default bf16)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    document = examine(args.device, args.precision)
    print(json.dumps(document) if args.json else _as_text(document))
    return 1 if _failures(document) else 0


def examine(device_name: str, precision: str) -> dict[str, Any]:
    """Everything the command prints, as plain data; every op runs once."""
    from kineticlip.commands.doctor.parts import examine_parts
    from kineticlip.runtime.machine import machine_record, software_record

    device = _device(device_name)
    document = {
        "device": str(device),
        "precision": precision,
        "machine": machine_record(),
        "software": software_record(),
        "table": _table(device),
        "decoders": [_decoder(name, load) for name, load in DECODERS.items()],
        "ops": [_op(*item) for item in _examples(device, precision)],
        "parts": examine_parts(),
    }
    return {"verdict": _verdict(document), **document}


def _verdict(document: dict[str, Any]) -> str:
    """Whether what has to work does, in one line, and which optional parts are missing."""
    failures = _failures(document)
    if failures:
        return f"FAILED: {'; '.join(failures)}"
    missing = [part["name"] for part in document["parts"] if not part["present"]]
    optional = f"; optional parts missing: {', '.join(missing)}" if missing else ""
    return f"works: all {len(document['ops'])} ops on {document['device']}{optional}"


def _failures(document: dict[str, Any]) -> list[str]:
    """What has to work everywhere and does not."""
    wrong = [op["op"] for op in document["ops"] if op["passed"] is False]
    failures = []
    if wrong:
        failures.append(f"{', '.join(wrong)}: beyond the tolerance on {document['device']}")
    for decoder in document["decoders"]:
        if decoder["name"] == "pyav" and not decoder["usable"]:
            failures.append(f"pyav: {decoder['reason']}")
    return failures


def _device(name: str) -> Any:
    import torch

    from kineticlip.runtime.errors import UserError

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch sees no GPU here")
    return device


def _table(device: Any) -> dict[str, str]:
    """The block sizes that kernels on this device read, and where they come from."""
    from kineticlip_kernels import tuning

    if device.type == "cpu":
        return {"name": "", "status": "no kernels run on a CPU"}
    name = tuning.table_name(device)
    return {"name": name, "status": tuning.status(name)}


def _examples(device: Any, precision: str) -> list[tuple[str, Any]]:
    import torch

    from kineticlip_kernels.examples import examples

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return list(examples(device, dtype).items())


def _op(name: str, example: Any) -> dict[str, Any]:
    """Which face "auto" takes, why, and whether its numbers keep to the tolerance rule."""
    from functools import partial

    import torch

    from kineticlip_kernels.dispatch import recorded_choices
    from kineticlip_kernels.tolerance import verify

    face = partial(example.op, impl="auto")
    with recorded_choices() as choices, torch.no_grad():
        face(**example.inputs)
        compared = []
        if example.reference is not None:
            compared = verify(example.reference, face, example.inputs)
    return {
        "op": name,
        "face": choices[0].face,
        "why_not_faster": list(choices[0].why_not),
        "checked": [str(result) for result in compared],
        # None: ran, but its results are no floats that the tolerance rule could compare.
        "passed": all(result.passed for result in compared) if compared else None,
    }


def _decoder(name: str, load: Callable[[], None]) -> dict[str, Any]:
    from kineticlip.video.container import Unsuitable

    try:
        load()
    except (ImportError, Unsuitable) as error:
        return {"name": name, "usable": False, "reason": str(error)}
    return {"name": name, "usable": True, "reason": _limit(name)}


def _limit(decoder: str) -> str:
    """What a usable decoder cannot do here."""
    import torch

    alone = decoder == "dali" and not torch.cuda.is_available()
    return "VP9 and MJPEG alone; H.264 and HEVC need a GPU" if alone else ""


def _load_pyav() -> None:
    importlib.import_module("av")


def _load_torchcodec() -> None:
    from kineticlip.video.torchcodec import load

    load()


def _load_dali() -> None:
    from kineticlip.video.dali import load

    load()


DECODERS = {"pyav": _load_pyav, "torchcodec": _load_torchcodec, "dali": _load_dali}


def _as_text(document: dict[str, Any]) -> str:
    machine, software = document["machine"], document["software"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "none"
    versions = ", ".join(
        f"{name} {software[name]}"
        for name in ("python", "torch", "triton", "xformers", "deepspeed")
        if software[name]
    )
    lines = [
        document["verdict"],
        "",
        f"cpu        {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"gpu        {gpus}",
        f"software   kineticlip {software['kineticlip']}",
        f"           {versions}",
        f"threads    OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}",
    ]
    if document["table"]["name"]:
        lines.append(f"blocks     {document['table']['name']}: {document['table']['status']}")
    for decoder in document["decoders"]:
        state = decoder["reason"]
        if decoder["usable"]:
            state = f"usable: {state}" if state else "usable"
        lines.append(f"decoder    {decoder['name']:<11} {state}")
    lines += _missing_parts(document["parts"])
    lines.append(f"\nops on {document['device']} in {document['precision']}, impl auto:")
    for op in document["ops"]:
        verdict = "  FAILED: " + "; ".join(op["checked"]) if op["passed"] is False else ""
        lines.append(f"  {op['op']:<23} {op['face']:<10} {_reason(op)}{verdict}".rstrip())
    return "\n".join(lines)


def _missing_parts(parts: list[dict[str, Any]]) -> list[str]:
    """A block that says of each missing part what it would add, and how to get it."""
    missing = [part for part in parts if not part["present"]]
    lines = ["", "optional parts that are missing:"] if missing else []
    for part in missing:
        lines.append(f"  {part['name']:<13} adds {part['adds']}")
        lines.append(f"  {'':<13} {part['reason']}")
    return lines


def _reason(op: dict[str, Any]) -> str:
    """The reasons against a faster face, tensors that share one in one breath."""
    shared: dict[str, list[str]] = {}
    for reason in op["why_not_faster"]:
        name, verb, rest = reason.partition(" is ")
        shared.setdefault(rest or reason, []).extend([name] if verb else [])
    return "; ".join(
        f"{', '.join(names)}: {rest}" if names else rest for rest, names in shared.items()
    )
