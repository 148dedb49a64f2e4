"""The console script and `python -m kineticlip`: a table of subcommands, imported when chosen."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from kineticlip.runtime.errors import UserError, did_you_mean
from kineticlip.runtime.version import __version__

# name -> one line of help; the code is kineticlip.commands.<name>
COMMANDS = {
    "predict": "rank class names for one video",
    "eval": "score a list of videos with several views each",
    "train": "train with DeepSpeed; resumes an interrupted run",
    "report": "make one HTML page from evaluation results",
    "demo": "render clips, train, evaluate and report, in minutes",
    "frames": "extract frames of a video by number",
    "prepare": "check the videos of a data set; write copies that decode faster",
    "features": "precompute the features of a frozen trunk (image tower)",
    "classifier": "build or inspect a classifier: text, random, sentence or LDA",
    "convert": "convert a checkpoint to the format of another code base",
    "bench": "benchmark the kernels on this machine, or tune block sizes",
    "doctor": "show what this machine can run, what is missing and why",
    "info": "count the parameters and multiply-adds of a configuration",
    "parity": "compare the engine with recorded outputs of official code",
    "attributes": "BIKE's attributes branch: extract, train, fuse",
}

EXAMPLES = {
    "predict": "clip.mp4 --labels 'archery, bowling, juggling'",
    "eval": "--config k400-text4vis-vitb16-f8 --weights official.pt \\\n"
    "      --list val.txt --root videos",
    "train": "--config k400-text4vis-vitb16-f8 --num-processes 8",
    "report": "runs/first/eval runs/second/eval --out compared.html",
    "demo": "--out demo-output",
    "frames": "clip.mp4 --at 0,10,20-29 --out frames.npz",
    "prepare": "train.txt --root videos \\\n      --good readable.txt --bad unreadable.txt",
    "features": "--config k400-evl-vitb16-f8 \\\n"
    "      --list train.txt --root videos --out features",
    "classifier": "build text --labels kinetics-400 --out text.safetensors",
    "convert": "official.pt weights.safetensors --to kineticlip",
    "bench": "--short",
    "doctor": "--precision fp32",
    "info": "k400-text4vis-vitl14_336-f32",
    "parity": "evl tests/golden/evl",
    "attributes": "extract runs/zero-shot/eval --out attributes.json",
}


def build_parser(selected: str | None = None) -> argparse.ArgumentParser:
    """The argument parser; only the selected subcommand's options are filled in."""
    parser = argparse.ArgumentParser(
        prog="kineticlip",
        description="Video recognition with CLIP, from video files to scores.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=16),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kineticlip {__version__}")
    # The deepspeed launcher puts it before the subcommand; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  kineticlip {name} {EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == selected:
            module = importlib.import_module(f"kineticlip.commands.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run, command_line=main)
    return parser


def _command_word(arguments: Sequence[str]) -> str | None:
    words = iter(arguments)
    for word in words:
        if word == "--local_rank":
            next(words, None)
        elif not word.startswith("-"):
            return word
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; 0: done, 1: a check failed, 2: the caller's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    selected = _command_word(arguments)
    if not arguments:
        build_parser().print_help(sys.stderr)
        return 2
    if selected is not None and selected not in COMMANDS:
        hint = did_you_mean(selected, COMMANDS)
        print(f"error: there is no command '{selected}'. {hint}", file=sys.stderr)
        return 2
    args = build_parser(selected).parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.addLevelName(logging.WARNING, "warning")
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `kineticlip ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
