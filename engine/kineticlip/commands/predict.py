"""`kineticlip predict`: ranks class names for one video."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from kineticlip.commands.options import add_config_options, add_model_options, configured

if TYPE_CHECKING:
    from kineticlip.config import Config
    from kineticlip.evaluation.recognizer import Prediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="FILE", help="a video, or a folder of frames")
    add_config_options(parser)
    add_model_options(parser, labels="class names, separated by commas, or a label file")
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="number of classes to print (5)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from kineticlip.evaluation.recognizer import load_recognizer, pick_device
    from kineticlip.runtime.errors import UserError
    from kineticlip.video import VideoError

    if args.top < 1:
        raise UserError(f"--top {args.top}: should be at least 1")
    if not Path(args.video).exists():
        raise VideoError(args.video, "no such file or folder")
    config, names = _configured(args)
    recognizer = load_recognizer(config, names, device=pick_device())
    found = recognizer.predict(args.video)
    if args.json:
        document = {
            "video": found.video,
            "untrained": recognizer.untrained,
            "arch": config.model.arch,
            "frames": found.frames,
            "views": found.views,
            "decoder": found.decoder,
            "ranking": [
                {"label": name, "probability": score} for name, score in found.ranking[: args.top]
            ],
        }
        json.dump(document, sys.stdout, indent=1, ensure_ascii=False)
        print()
        return 0
    if recognizer.untrained:
        print("UNTRAINED weights: this ranking is random")
    print("\n".join(_lines(found, args.top)))
    return 0


def _configured(args: argparse.Namespace) -> tuple[Config, tuple[str, ...]]:
    """The configuration, and the class names: those of --labels, listed there or in a file."""
    from pathlib import Path

    from kineticlip.data.labels import read_labels
    from kineticlip.evaluation.recognizer import scoring_others
    from kineticlip.runtime.errors import UserError

    if args.labels and "," in args.labels and not Path(args.labels).exists():
        names = tuple(name.strip() for name in args.labels.split(",") if name.strip())
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"--labels: class '{twice}' is listed twice")
        if names:
            unlabelled = argparse.Namespace(**{**vars(args), "labels": None})
            return scoring_others(configured(unlabelled)), names
    config = configured(args)
    if not config.data.labels:
        raise UserError("no class names: give --labels 'first, second' or a label file")
    return config, read_labels(config.data.labels)


def _lines(found: Prediction, top: int) -> list[str]:
    """What the video is, and its best classes with a bar each."""
    views = f"{found.frames} frames, {found.views} views, decoded by {found.decoder}"
    lines = [f"{found.video}: {views}"]
    ranking = found.ranking[:top]
    width = max(len(name) for name, _ in ranking)
    for place, (name, score) in enumerate(ranking, 1):
        bar = "#" * round(30 * score)
        lines.append(f"{place:>3}  {name:<{width}}  {100 * score:6.2f} %  {bar}".rstrip())
    return lines
