"""What the CPU's path chose, each piece against what it could be, in rounds that alternate.

    OMP_NUM_THREADS=1 python bench/cpu_choices.py --results bench/results

Pieces of an image, at the shapes of ViT-B/16 and ViT-L/14-336; `ratio` is the rival's time over
that of what the engine does, the median over the rounds. What the pieces are worth together stands
in end_to_end.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_results import keep
from kineticlip.models import packed as inference
from kineticlip.models.packed import ByteLinear, PackedLinear, fused_quantise, quantise_rows
from kineticlip.runtime.machine import machine_record, software_record
from kineticlip_kernels import attention

Run = Callable[[], Any]
ROWS_B, ROWS_L = 3152, 1154  # tokens of 16 images of ViT-B/16, and of 2 of ViT-L/14-336
WIDTH_B, WIDTH_L = 768, 1024


@dataclass(frozen=True)
class Choice:
    """What the engine runs, and what it could: the same inputs, near enough the same outputs."""

    what: str
    shape: str
    rival: str
    engine: Run
    other: Run


def randn(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def choices() -> Iterator[Choice]:
    qkv = randn(1, 577, 3, 16, 64)
    chunked = partial(attention.attention_chunked, qkv)

    def all_heads() -> Tensor:
        with patch.object(attention, "CHUNK", 1 << 40):
            return attention.attention_chunked(qkv)

    shape = "1 x 577 x 16 x 64"
    yield Choice("attention, a few heads at a time", shape, "all heads", chunked, all_heads)
    fused = partial(attention.attention_sdpa, qkv)
    yield Choice("attention, a few heads at a time", shape, "SDPA", chunked, fused)

    for rows, width in ((ROWS_B, WIDTH_B), (ROWS_B, 4 * WIDTH_B), (ROWS_L, 4 * WIDTH_L)):
        x = randn(rows, width)
        plain = partial(quantise_rows, x)

        def at_once(x: Tensor = x) -> Any:
            with patch.object(inference, "ROWS", 1 << 40):
                return quantise_rows(x)

        compiled = torch.compile(fused_quantise, dynamic=True)
        shape = f"{rows} x {width}"
        yield Choice("quantising, 64 rows at a time", shape, "all rows", plain, at_once)
        yield Choice("quantising, compiled", shape, "in pieces", partial(compiled, x), plain)

    for rows, width in ((ROWS_B, WIDTH_B), (ROWS_L, WIDTH_L)):
        x, weight, bias = randn(rows, width), randn(4 * width, width), randn(4 * width)
        packed, byte = PackedLinear(weight, bias), ByteLinear(weight, bias)
        byte.quantise = torch.compile(fused_quantise, dynamic=True)
        shape = f"{rows} x {width} x {4 * width}"
        free = partial(F.linear, x, weight, bias)
        yield Choice("bf16 product, packed", shape, "F.linear", partial(packed, x), free)
        yield Choice("int8 product", shape, "bf16, packed", partial(byte, x), partial(packed, x))
        values = fused_quantise(x)[0]
        product = partial(byte.product, values)
        yield Choice("int8 product alone", shape, "with quantising", product, partial(byte, x))


def timed(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def measure(choice: Choice, rounds: int) -> dict[str, Any]:
    """Both run in every round, for about 50 ms each."""
    for run in (choice.engine, choice.other):
        timed(run, 2)
    calls = max(1, int(0.05 / min(timed(choice.engine, 1), timed(choice.other, 1))))
    ratios = []
    for number in range(rounds):
        runs = (choice.engine, choice.other)
        first, second = (timed(run, calls) for run in (runs if number % 2 else runs[::-1]))
        ratios.append(second / first if number % 2 else first / second)
    return {
        "what": choice.what,
        "shape": choice.shape,
        "rival": choice.rival,
        "ratio": round(median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'what':<34} {'shape':<20} {'against':<18} ratio (range)"]
    for row in rows:
        low, high = row["range"]
        start = f"{row['what']:<34} {row['shape']:<20} {row['rival']:<18}"
        lines.append(f"{start} {row['ratio']:5.2f} ({low:.2f}-{high:.2f})")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of both in turn (15)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep the document there")
    options = parser.parse_args()
    software = software_record()  # before it can change while this runs
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [measure(choice, options.rounds) for choice in choices()]
    record = {
        "kind": "cpu-choices",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine_record(),
        "software": software,
        "settings": {"threads": torch.get_num_threads(), "rounds": options.rounds},
        "rows": rows,
    }
    print(json.dumps(record, indent=1) if options.json else table(rows))
    if options.results is not None:
        print(f"written: {keep(options.results, record, 'cpu-choices')}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
