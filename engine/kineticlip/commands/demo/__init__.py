"""`kineticlip demo`: the whole path on clips it renders itself, in a few minutes on two cores.

Every step is a command a user could type, printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CommandLine = Callable[[Sequence[str]], int]  # the console script's own entry, handed down

RECIPE = "demo-text4vis-tiny16-f6"
SOURCES = {"text": "text", "orthogonal": "random_orthogonal"}
SPLITS = {
    "seen": "24 sentences seen in training",
    "kept_out": "12 kept-out sentences, among themselves",
    "kept_out_all": "12 kept-out sentences, among all 36",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo-output", metavar="DIR", help="output folder")
    parser.add_argument(
        "--clips", type=int, default=50, metavar="N", help="training clips per class (50)"
    )
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="training processes (2)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key of the recipe; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    # Before torch is imported: the small model's products are too short to share. One thread
    # scored 29 videos/s where two, on cores with other work, scored 3.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from kineticlip.commands.demo.clips import render, write_start_weights

    root = Path(args.out)
    root.mkdir(parents=True, exist_ok=True)
    _say("Rendering H.264 clips of coloured balls in motion; class names are sentences.")
    data = render(root, train_per_class=args.clips, test_per_class=8)
    count = sum(1 for _ in data.root.glob("*.mp4"))
    print(f"  {count} clips under {data.root}, 24 sentences to train on, 12 kept out")

    start = write_start_weights(root / "start.safetensors")
    for name, source in SOURCES.items():
        _say(f"Training against a frozen {name} classifier.")
        _command(
            args.command_line, "train", "--config", RECIPE, "--num-processes", str(args.processes),
            *_sets(
                f"name=demo-{name}", f"output={root / name}", f"classifier.source={source}",
                f"model.weights={start}",
                f"data.train_list={data.train_list}", f"data.train_root={data.root}",
                f"data.labels={data.seen_labels}",
                *args.set,
            ),
        )  # fmt: skip
    lists = {
        "seen": (data.seen_list, data.seen_labels),
        "kept_out": (data.kept_list, data.kept_labels),
        "kept_out_all": (data.kept_among_all_list, data.all_labels),
    }
    for name in SOURCES:
        _say(f"Scoring the {name} classifier's model: 2 clips x 3 crops of every video.")
        for split, (videos, labels) in lists.items():
            _command(
                args.command_line, "eval", "--weights", str(root / name / "weights.safetensors"),
                "--list", str(videos), "--root", str(data.root), "--labels", str(labels),
                "--out", str(root / f"{name}-{split}"),
            )  # fmt: skip
    report = root / "report.html"
    _say("Writing the report.")
    folders = [str(root / f"{name}-{split}") for name in SOURCES for split in SPLITS]
    _command(
        args.command_line, "report", *folders, "--out", str(report), "--title", "KinetiCLIP demo"
    )
    _table(root)
    print(f"\nReport: {report}")
    return 0


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _sets(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def _command(command_line: CommandLine, *words: str) -> None:
    print(f"  $ kineticlip {shlex.join(words)}", flush=True)
    status = command_line(words)
    if status != 0:
        sys.exit(status)


def _table(root: Path) -> None:
    print(f"\n{'top-1, % [95 % interval]':<42}{'text':>22}{'orthogonal':>22}{'chance':>9}")
    for split, meaning in SPLITS.items():
        cells, chance = [], 0.0
        for name in SOURCES:
            summary: dict[str, Any] = json.loads(
                (root / f"{name}-{split}" / "summary.json").read_text()
            )
            low, high = summary["top1_interval"]
            cells.append(f"{summary['top1']:.1f} [{low:.1f}, {high:.1f}]")
            chance = 100.0 / summary["classes"]
        print(f"{meaning:<42}" + "".join(f"{cell:>22}" for cell in cells) + f"{chance:>9.1f}")
