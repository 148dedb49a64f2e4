"""`kineticlip eval`: scores a list of videos with several views each; resumes where it was."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kineticlip.commands.options import add_config_options, add_model_options, configured

if TYPE_CHECKING:
    from kineticlip.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    add_model_options(parser)
    parser.add_argument("--list", metavar="FILE", help="videos to score; default data.val_list")
    parser.add_argument("--root", metavar="DIR", help="folder of the listed paths")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N videos")
    parser.add_argument("--out", metavar="DIR", help="results folder; default <output>/eval")
    parser.add_argument("--fresh", action="store_true", help="drop results that are there already")
    parser.add_argument("--scores", action="store_true", help="keep every video's scores")
    parser.add_argument("--thumbnails", type=int, default=12, metavar="N", help="pictures to keep")
    parser.add_argument("--deterministic", action="store_true", help="repeat to the byte")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    config = configured(args)
    data = config.data
    if args.list is not None:
        data = replace(data, val_list=args.list, val_root=args.root or "")
    elif args.root is not None:
        data = replace(data, val_root=args.root)
    deterministic = args.deterministic or config.eval.deterministic
    config = replace(config, data=data, eval=replace(config.eval, deterministic=deterministic))
    out = Path(args.out) if args.out else config.output_dir / "eval"
    summary = evaluate_list(
        config,
        out,
        limit=args.limit,
        fresh=args.fresh,
        keep_scores=args.scores,
        thumbnails=args.thumbnails,
        quiet=args.json,
    )
    if args.json:
        json.dump({"results": str(out), **summary}, sys.stdout, indent=1)
        print()
    else:
        print("\n".join(describe(summary)))
        print(f"results: {out}")
    return 0


def evaluate_list(
    config: Config,
    out: Path,
    *,
    limit: int | None = None,
    fresh: bool = False,
    keep_scores: bool = False,
    thumbnails: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Scores data.val_list into the folder `out` and returns the summary."""
    from kineticlip.dataset import read_labels, scoring_list
    from kineticlip.errors import UserError
    from kineticlip.evaluate import evaluate_videos
    from kineticlip.loader import TestLoader
    from kineticlip.measure import machine_record
    from kineticlip.predictor import load_recognizer, pick_device
    from kineticlip.results import ResultWriter, protocol_fingerprint, remove_results

    if not config.data.labels:
        raise UserError("data.labels is not set: give --labels a label file or a built-in name")
    class_names = read_labels(config.data.labels)
    listed = scoring_list(config, len(class_names))
    entries = listed.entries[:limit]
    if not entries:
        raise UserError(f"{config.data.val_list}: no video to score")
    recognizer = load_recognizer(config, class_names, device=pick_device())
    listing = [(entry.name, entry.label) for entry in entries]
    protocol = protocol_fingerprint(
        config, listing, class_names=class_names, weights=recognizer.weights
    )
    if fresh:
        remove_results(out)
    with ResultWriter.open(
        out, protocol, entries=listing, class_names=class_names, keep_scores=keep_scores
    ) as writer:
        done = writer.done
        todo = [entry for entry in entries if entry.name not in done]
        if recognizer.classifier is not None:
            writer.save_classifier(recognizer.classifier.numpy())
        loader = TestLoader(todo, config, pipeline=recognizer.method.pipeline)
        clock = evaluate_videos(
            recognizer.model,
            recognizer.method,
            loader,
            writer,
            total=len(todo),
            device=recognizer.device,
            chunk=recognizer.chunk,
            thumbnails=thumbnails,
            progress=not quiet,
        )
        return writer.finish(machine=machine_record(), speed=clock.summary())


def describe(summary: dict[str, Any]) -> list[str]:
    """The summary in a few lines for a person."""
    lines = []
    protocol = summary["protocol"]
    if protocol["weights"] == "untrained":
        lines.append("UNTRAINED weights: these numbers say nothing about any trained model")
    if summary["top1"] is not None:
        low, high = summary["top1_interval"]
        lines.append(
            f"top-1 {summary['top1']:.2f} % [{low:.2f}, {high:.2f}]   "
            f"top-5 {summary['top5']:.2f} %   mean class {summary['mean_class_accuracy']:.2f} %"
        )
    lines.append(
        f"{summary['scored']} videos of {summary['classes']} classes, "
        f"{protocol['clips']} clips x {protocol['crops']} crops x {protocol['frames']} frames"
    )
    if summary["bad"]:
        reasons = "; ".join(f"{count} x {why}" for why, count in summary["bad_reasons"].items())
        lines.append(f"{summary['bad']} videos could not be decoded and are not counted: {reasons}")
    speed = summary["speed"]
    if speed.get("videos"):
        waits = ", ".join(
            f"{what} {speed[f'{what}_percent']:.0f} %" for what in ("decode", "transfer", "compute")
        )
        lines.append(
            f"{speed['videos_per_second']:.2f} videos/s, "
            f"{speed['images_per_second']:.1f} images/s; time spent waiting: {waits}"
        )
    return lines
