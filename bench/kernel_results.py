"""The result file of the kernel benchmarks: one JSON document, its writer and its validator.

    python bench/kernel_results.py PARTS FOLDER

makes it of what several processes have left in PARTS, and writes it into FOLDER.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SCHEMA = 1
ROWS, TESTS, LIMITS, STEPS = "rows.jsonl", "tests.jsonl", "limits.json", "steps.jsonl"
TOP = {
    "schema": int,
    "kind": str,
    "date": str,
    "complete": bool,
    "machine": dict,
    "software": dict,
    "config": dict,
    "limits": dict,
    "correctness": dict,
    "rows": list,
}
ROW = {
    "case": str,
    "op": str,
    "impl": str,
    "direction": str,
    "dtype": str,
    "shape": dict,
    "n": int,
    "p20_ms": float,
    "p50_ms": float,
    "p80_ms": float,
    "peak_bytes": (int, type(None)),
    "flops": float,
    "bytes": float,
    "gb_per_s": float,
    "tflop_per_s": float,
    "percent_of_limit": (float, type(None)),  # None: memory bounds it, and a cache served it
}


def document(
    rows: list[dict[str, Any]],
    *,
    limits: dict[str, Any],
    correctness: dict[str, Any],
    config: dict[str, Any],
    complete: bool,
) -> dict[str, Any]:
    """A result file's content: the rows, and under what conditions they were measured."""
    from kineticlip.runtime.machine import machine_record, software_record

    return {
        "schema": SCHEMA,
        "kind": "kernels",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "complete": complete,
        "machine": machine_record(),
        "software": software_record(),
        "config": config,
        "limits": limits,
        "correctness": correctness,
        "rows": rows,
    }


def gather(parts: Path, *, complete: bool = True) -> dict[str, Any]:
    """A result file's content from a folder of parts: rows, limits, outcomes of tests, steps."""
    import torch

    import kernel_bench
    from kineticlip_kernels import tuning
    from run_parts import lines

    blocks = {"table": "none", "status": "no kernels run on a CPU"}
    if kernel_bench.GPU:
        table = tuning.table_name(kernel_bench.DEVICE)
        blocks = {"table": table, "status": tuning.status(table)}
    limits = dict(json.loads((parts / LIMITS).read_text())) if (parts / LIMITS).exists() else {}
    copy = {"copy_gb_per_s": limits.pop("copy") / 1e9} if "copy" in limits else {}
    products = {name: limit / 1e12 for name, limit in limits.items()}
    steps = lines(parts / STEPS)
    tests = {record["node"]: record["outcome"] for record in lines(parts / TESTS)}
    outcomes = {
        outcome: [node for node, found in tests.items() if found == outcome]
        for outcome in ("passed", "skipped", "failed")
    }
    return document(
        lines(parts / ROWS),
        limits={**copy, "matmul_tflop_per_s": products},
        correctness={
            "passed": sum(not node.startswith("bench/") for node in outcomes["passed"]),
            "skipped": len(outcomes["skipped"]),
            "failed": outcomes["failed"],
        },
        config={
            "blocks": blocks,
            "absent": kernel_bench.absent(),
            "threads": torch.get_num_threads(),
            "load": round(
                os.getloadavg()[0], 2
            ),  # processes that wanted a core, of the last minute
            "steps": steps,
        },
        complete=complete and all(step["status"] == 0 for step in steps),
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of at most 80 columns: a heading for every case, and under it who ran it how fast."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return [line for case, own in cases.items() for line in (case, *map(_line, own))]


def _line(row: dict[str, Any]) -> str:
    percent, rate = row["percent_of_limit"], row["tflop_per_s"]
    share = "cached" if percent is None else f"{percent:.0f} %"
    work = f"{_three(rate)} TFLOP/s" if rate >= 1 else f"{_three(1000 * rate)} GFLOP/s"
    return (
        f"  {row['impl']:<22} {_three(row['p50_ms']):>8} ms {_three(row['gb_per_s']):>7} GB/s "
        f"{work if rate else '':>16} {share:>7}"
    )


def _three(value: float) -> str:
    """Three digits, or all of a larger number."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{min(max(digits, 0), 4)}f}"


def result_path(folder: Path, content: dict[str, Any]) -> Path:
    """<folder>/<device>-torch<version>/<date>-<commit>.json"""
    gpus = content["machine"]["gpus"]
    device = gpus[0]["name"] if gpus else "cpu"
    device = re.sub(r"[^a-z0-9]+", "-", device.lower().replace("nvidia", "")).strip("-")
    torch_version = str(content["software"]["torch"]).partition("+")[0]
    day = content["date"][:10].replace("-", "")
    commit = (content["software"]["commit"] or "unknown")[:7]
    return folder / f"{device}-torch{torch_version}" / f"{day}-{commit}.json"


def keep(folder: Path, content: dict[str, Any], kind: str = "") -> Path:
    """Writes a result file whole or not at all; kind: what its name ends in."""
    from kineticlip.runtime.files import write_atomic

    path = result_path(folder, content)
    path = path.with_stem(f"{path.stem}-{kind}") if kind else path
    write_atomic(path, f"{json.dumps(content, indent=1)}\n".encode())
    return path


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Writes a valid document; raises ValueError for one that is not."""
    problems = validate(content)
    if problems:
        raise ValueError("; ".join(problems))
    return keep(folder, content)


def validate(content: dict[str, Any]) -> list[str]:
    """What is wrong with a result file; empty when nothing is."""
    problems = _check(content, TOP, "document")
    if problems:
        return problems
    if content["schema"] != SCHEMA or content["kind"] != "kernels":
        problems.append(f"schema {content['schema']} of {content['kind']}, expected {SCHEMA}")
    for key in ("commit", "dirty", "torch", "python"):
        if key not in content["software"]:
            problems.append(f"software: no {key}")
    if "gpus" not in content["machine"] or "cpu" not in content["machine"]:
        problems.append("machine: no gpus or cpu")
    for number, row in enumerate(content["rows"]):
        found = _check(row, ROW, f"rows[{number}]")
        if not found and not row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]:
            found.append(f"rows[{number}]: percentiles are not in order")
        problems += found
    names = [(row.get("case"), row.get("impl")) for row in content["rows"]]
    problems += [f"rows: {name} twice" for name in sorted(set(names)) if names.count(name) > 1]
    return problems


def _check(content: dict[str, Any], fields: dict[str, Any], where: str) -> list[str]:
    problems = [f"{where}: no {name}" for name in fields if name not in content]
    problems += [f"{where}: unknown {name}" for name in content if name not in fields]
    for name, kind in fields.items():
        value = content.get(name)
        if name in content and not isinstance(value, (int, float) if kind is float else kind):
            problems.append(f"{where}: {name} is {value!r}")
        elif isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            problems.append(f"{where}: {name} is {value}")
    return problems


def main(parts: str, folder: str) -> int:
    content = gather(Path(parts))
    if not content["rows"]:
        print("no case was measured, so there is no result file", file=sys.stderr)
        return 1
    counts = content["correctness"]
    print(
        f"{write(Path(folder), content)}: {len(content['rows'])} rows, {counts['passed']} tests "
        f"passed, {counts['skipped']} skipped, {len(counts['failed'])} failed, complete: "
        f"{content['complete']}"
    )
    for rival, reason in content["config"]["absent"].items():
        print(f"no rows of {rival}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
