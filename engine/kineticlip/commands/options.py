"""Options that several subcommands share, and what they say about the configuration."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kineticlip.config import Config


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """--config and --set, as every command with a configuration has them."""
    parser.add_argument("--config", metavar="FILE", help="a YAML file, or the name of a recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key of the configuration, e.g. data.num_frames=16; repeatable",
    )


def add_model_options(
    parser: argparse.ArgumentParser,
    *,
    labels: str = "class names: a CSV file with id,name; a text file with one name per "
    "line; or a built-in set such as kinetics-400",
) -> None:
    """--weights and --labels."""
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="a checkpoint in any known format, an open_clip tag, or 'random' (untrained)",
    )
    parser.add_argument("--labels", metavar="NAMES", help=labels)


def configured(args: argparse.Namespace) -> Config:
    """The configuration of --config, or that the weights file carries, or plain CLIP.

    --set changes it, then --weights and --labels. Plain CLIP averages its frame embeddings: it
    has no temporal header that would have to be trained.
    """
    from dataclasses import replace
    from pathlib import Path

    from kineticlip.config import load_config, override
    from kineticlip.evaluation.recognizer import config_of, plain_clip, with_weights

    if args.config is not None:
        config = load_config(args.config, args.set)
    elif args.weights is not None and Path(args.weights).is_file():
        config = override(config_of(args.weights), args.set)
    else:
        config = override(plain_clip(), args.set)
    if args.weights is not None:
        return with_weights(config, args.weights, args.labels or "")
    return replace(config, data=replace(config.data, labels=args.labels or config.data.labels))
