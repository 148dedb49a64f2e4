"""`kineticlip bench`: the kernels' benchmarks on this machine; --tune finds their block sizes.

--aot needs no GPU: every kernel compiled for three generations of them, as a table of registers,
spilled bytes, shared memory, tensor-core instructions and 128-bit accesses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from kineticlip.runtime.errors import UserError

NO_TESTS = 5  # pytest's exit status where it collected none
CAPTURED = 10  # calls in the graph that --tune replays


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="WORDS", help="run only matching cases (as pytest -k)")
    parser.add_argument("--short", action="store_true", help="run only the most informative cases")
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder for a result file")
    parser.add_argument(
        "--allow-dirty", action="store_true", help="write it even if the checkout has changes"
    )
    parser.add_argument("--tune", action="store_true", help="tune block sizes instead; needs a GPU")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="with --tune: table to write (configs/*.json)"
    )
    parser.add_argument(
        "--aot",
        action="store_true",
        help="compile every kernel for sm_80, sm_90 and sm_100 instead; takes minutes, no GPU",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    if args.write is not None and not args.tune:
        raise UserError("--write FILE needs --tune")
    if args.tune and args.aot:
        raise UserError("--tune and --aot cannot be combined")
    timing = {"--only": args.only, "--short": args.short, "--results": args.results}
    timing["--allow-dirty"] = args.allow_dirty
    unused = ", ".join(option for option, value in timing.items() if value)
    if unused and (args.tune or args.aot):
        mode = "--tune" if args.tune else "--aot"
        raise UserError(f"{unused}: only for timing; remove it, or remove {mode}")
    if args.aot:
        return _compile(args)
    return _tune(args) if args.tune else _bench(args)


def _source(file: str) -> Path:
    """A file of the source checkout that this package runs from."""
    path = Path(__file__).resolve().parents[3] / file
    if not path.is_file():
        raise UserError(f"{path} is not there; run from a source checkout")
    return path


def _compile(args: argparse.Namespace) -> int:
    from kineticlip_kernels.aot.report import report

    return report(as_json=args.json)


def _bench(args: argparse.Namespace) -> int:
    folder = _source("bench/kernel_bench.py").parent
    with tempfile.TemporaryDirectory() as scratch:
        results = args.results or (Path(scratch) if args.json else None)
        command = [sys.executable, "-m", "pytest", str(folder), "--benchmark-only"]
        command += ["--benchmark-quiet", "-q", f"--rootdir={folder.parent}"]
        command += ["-k", args.only] if args.only else []
        command += ["-m", "short"] if args.short else []
        command += [f"--results={results.resolve()}"] if results else []
        command += ["--allow-dirty"] if args.allow_dirty or not args.results else []
        # pytest's own words go to stderr where stdout is to be one document.
        # A pytest-xdist worker above this process would switch the timing off.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        output = sys.stderr if args.json else None
        done = subprocess.run(command, stdout=output, env=inherited, check=False)
        if done.returncode == NO_TESTS:
            raise UserError(f"no case matches --only {args.only!r} here")
        if results is not None and args.json:
            written = max(results.glob("*/*.json"), key=lambda p: p.stat().st_mtime, default=None)
            if written is None:
                raise UserError("no case was measured, so there is no document")
            sys.stdout.write(written.read_text())
    return 0 if done.returncode == 0 else 1


def _tune(args: argparse.Namespace) -> int:
    import torch

    from kineticlip.runtime.files import write_atomic
    from kineticlip_kernels import tune, tuning
    from kineticlip_kernels.tune.targets import targets

    if not torch.cuda.is_available():
        raise UserError("--tune: PyTorch sees no GPU here")
    device = torch.device("cuda", torch.cuda.current_device())
    chosen = []
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for target, times in tune.tune(targets(), device, milliseconds):
            if not times:
                raise UserError(f"--tune: no candidate of {target.kernel} runs on this GPU")
            chosen.append((target, times[0][0]))
            print(_line(target, times), file=sys.stderr, flush=True)
    name = torch.cuda.get_device_name(device)
    table: dict[str, Any] = {
        "status": f"measured on {name} with torch {torch.__version__}, {date.today().isoformat()}"
    }
    table |= tune.with_rows(tuning.read_table(tuning.table_name(device)), chosen)
    text = json.dumps(table, indent=1) + "\n"
    if args.write is not None:
        write_atomic(args.write, text.encode())
    if args.json or args.write is None:
        sys.stdout.write(text)
    return 0


def milliseconds(call: Any) -> float:
    """One call's share of a CUDA graph of CAPTURED, the median of 15 replays.

    Without a graph the host would be timed: it takes longer to launch a backward pass than an
    H200 to run the smaller kernels. The current stream must not be the default one, and be the one
    on which the call's forward pass was recorded: backward runs there. TooLarge where the GPU
    cannot launch the call.
    """
    import torch
    from triton.runtime.errors import OutOfResources

    from kineticlip.runtime.machine import time_calls
    from kineticlip_kernels.tune import TooLarge

    graph = torch.cuda.CUDAGraph()
    try:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(CAPTURED):
                call()
    except OutOfResources as error:
        raise TooLarge(str(error)) from None
    return time_calls(graph.replay, warmup=3, repeats=15).p50 / CAPTURED


def _line(target: Any, times: list[tuple[Any, float]]) -> str:
    best, fastest = times[0]
    slowest = times[-1][1]
    return f"{target.kernel} {dict(target.sizes)}: {dict(best)} {fastest:.4f} ms ({slowest:.4f})"
