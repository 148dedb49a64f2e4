"""The console script: one table of subcommands, each imported only when it is chosen."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from kineticlip import __version__
from kineticlip.errors import UserError

# name -> one line of help; the code is kineticlip.commands.<name>
COMMANDS = {
    "predict": "rank class names for one video",
    "eval": "score a list of videos with several views each",
    "train": "train under DeepSpeed, resuming where the last checkpoint stands",
    "attributes": "train BIKE's second branch on class names, and fuse both branches",
    "classifier": "build a classifier file from text, random rows, LDA or a language model",
    "info": "count the parameters and multiply-adds of a configuration",
    "convert": "rewrite a checkpoint of one code base for another",
    "report": "make one HTML page from the result files of an evaluation",
    "demo": "render clips, train, evaluate and report: the whole path in minutes",
    "parity": "replay recorded outputs of an official code and compare",
    "frames": "write chosen frames of a video, by number",
    "prepare": "check the videos of a data set, and write smaller copies of them",
}


def build_parser(selected: str | None = None) -> argparse.ArgumentParser:
    """The argument parser; only the selected subcommand's options are filled in."""
    parser = argparse.ArgumentParser(
        prog="kineticlip",
        description="CLIP as a video recogniser, from file to score.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kineticlip {__version__}")
    # The deepspeed launcher puts it before the subcommand; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == selected:
            module = importlib.import_module(f"kineticlip.commands.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; 0: done, 1: a check failed, 2: the caller's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    selected = next((word for word in arguments if not word.startswith("-")), None)
    args = build_parser(selected).parse_args(arguments)
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
