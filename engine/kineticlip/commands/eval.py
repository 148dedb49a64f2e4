"""`kineticlip eval`: scores a list of videos with several views each; resumes where it was.

Zero-shot over the three fixed splits of Kinetics-600, with their mean and deviation:

    kineticlip eval --weights FILE --split split1.txt kinetics-600-split1 \\
        --split split2.txt kinetics-600-split2 --split split3.txt kinetics-600-split3
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kineticlip.commands.options import add_config_options, add_model_options, configured

if TYPE_CHECKING:
    from kineticlip.config import Config
    from kineticlip.evaluation.speed import Performance

LEAST = {"official_processes": 1, "official_batch": 1, "limit": 1, "thumbnails": 0}
PROTOCOL = """
Views and precision are keys of the configuration. A view is one clip (a set of
frames) and one crop of the video; scores are averaged over all views:
  --set test.clips=4 --set test.crops=3
  --set eval.precision=int8    (or fp32, bf16; on a GPU also fp16, fp8)"""
METRICS = ("zero-shot", "map", "multilabel", "official-padded")  # evaluation.protocols.PROTOCOLS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    add_model_options(parser)
    parser.add_argument("--list", metavar="FILE", help="list of videos (default: data.val_list)")
    parser.add_argument("--root", metavar="DIR", help="folder that the paths are relative to")
    parser.add_argument(
        "--split",
        nargs=2,
        action="append",
        metavar=("FILE", "NAMES"),
        help="a list with its own class names (e.g. kinetics-600-split1), in place of --list and "
        "--labels; repeatable: every split is scored, then mean and deviation are reported",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        choices=METRICS,
        metavar="NAME",
        help=f"further metrics: {', '.join(METRICS)}",
    )
    parser.add_argument(
        "--official-processes",
        type=int,
        default=8,
        metavar="N",
        help="for official-padded: number of processes that shared the list (8)",
    )
    parser.add_argument(
        "--official-batch",
        type=int,
        default=1,
        metavar="N",
        help="for multilabel: batch size of the official running mean (1)",
    )
    parser.epilog = f"{parser.epilog}\n{PROTOCOL}"
    parser.add_argument("--limit", type=int, metavar="N", help="score only the first N videos")
    parser.add_argument(
        "--features", metavar="DIR", help="features of these videos, from `kineticlip features`"
    )
    parser.add_argument("--out", metavar="DIR", help="results folder (default: <output>/eval)")
    parser.add_argument(
        "--fresh", action="store_true", help="discard earlier results; do not resume"
    )
    parser.add_argument("--scores", action="store_true", help="save the scores of every video")
    parser.add_argument(
        "--thumbnails", type=int, default=12, metavar="N", help="number of thumbnails (12)"
    )
    parser.add_argument("--deterministic", action="store_true", help="make runs repeat to the byte")
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="split the videos over N processes on this machine, one per GPU, or sharing its cores",
    )
    parser.add_argument("--part-of-run", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    from kineticlip.report.text import describe

    if args.part_of_run:
        return _run_part()
    _check_least(args)
    if args.split:
        return _run_splits(args)
    config = _configured(args)
    out = Path(args.out) if args.out else config.output_dir / "eval"
    summary = _evaluate(args, config, out)
    _print_outcome(args, out, summary, describe(summary))
    return 0 if summary["scored"] else 1


def _check_least(args: argparse.Namespace) -> None:
    from kineticlip.runtime.errors import UserError

    for name, least in LEAST.items():
        given = getattr(args, name)
        if given is not None and given < least:
            raise UserError(f"--{name.replace('_', '-')} should be at least {least}, got {given}")


def _print_outcome(
    args: argparse.Namespace, out: Path, document: dict[str, Any], lines: list[str]
) -> None:
    """The document with --json, else the lines; and where the files are."""
    if args.json:
        json.dump({"results": str(out), **document}, sys.stdout, indent=1)
        print()
        return
    print("\n".join([*lines, f"results: {out}"]))


def _run_part() -> int:
    """A process of evaluate_in_processes: scores the share that its parent hands it."""
    from kineticlip.config import config_from_dict
    from kineticlip.evaluation.processes import Order, write_performance
    from kineticlip.evaluation.run import ListOptions, evaluate_share
    from kineticlip.runtime.distributed import end_with

    order = Order.loaded(sys.stdin.read())
    end_with(order.parent, poll_seconds=0.2)
    part = Path(order.part)
    config = config_from_dict(order.config, "the parent process")
    options = ListOptions(**{**order.settings, "quiet": True})
    found = evaluate_share(config, part, options, videos=order.videos, whole=Path(order.out))
    write_performance(part, found)
    return 0


def _run_splits(args: argparse.Namespace) -> int:
    """Every split into a folder of its own; splits.json beside them has mean and deviation."""
    from kineticlip.evaluation.protocols import over_splits
    from kineticlip.report.text import describe, describe_splits
    from kineticlip.runtime.files import write_atomic
    from kineticlip.runtime.journal import dump_json

    configs = _split_configs(args)
    out, summaries = Path(args.out) if args.out else configs[0].output_dir / "eval", []
    for number, config in enumerate(configs, 1):
        summary = _evaluate(args, config, out / f"split{number}")
        summaries.append(summary)
        if not args.json:
            print(f"split {number}: {config.data.val_list}")
            print("\n".join(f"  {line}" for line in describe(summary)))
    splits = [{"list": listing, "labels": labels} for listing, labels in args.split]
    combined = over_splits(summaries)
    document = {"splits": splits, "over_splits": combined}
    write_atomic(out / "splits.json", dump_json(document, indent=1))
    _print_outcome(args, out, document, describe_splits(combined))
    return 0


def _split_configs(args: argparse.Namespace) -> list[Config]:
    """A configuration for every split. A mistake in the last shows before the first is scored."""
    from kineticlip.evaluation.run import listed_videos
    from kineticlip.runtime.errors import UserError

    if args.list is not None or args.labels is not None:
        raise UserError(
            "--split comes with its own list and class names; leave out --list and --labels"
        )
    configs = []
    for listing, labels in args.split:
        split = argparse.Namespace(**{**vars(args), "list": listing, "labels": labels})
        configs.append(_configured(split))
        listed_videos(configs[-1])
    return configs


def _configured(args: argparse.Namespace) -> Config:
    """The configuration with the options of this command in it."""
    from dataclasses import replace

    config = configured(args)
    data = config.data
    if args.list is not None:
        data = replace(data, val_list=args.list, val_root=args.root or "")
    elif args.root is not None:
        data = replace(data, val_root=args.root)
    if args.features is not None:
        data = replace(data, features=args.features)
    deterministic = args.deterministic or config.eval.deterministic
    return replace(config, data=data, eval=replace(config.eval, deterministic=deterministic))


def _evaluate(args: argparse.Namespace, config: Config, out: Path) -> dict[str, Any]:
    from kineticlip.evaluation.run import ListOptions, evaluate_list

    found = _share_out(args, config, out) if args.num_processes is not None else None
    options = ListOptions(
        limit=args.limit,
        fresh=args.fresh and args.num_processes is None,
        keep_scores=args.scores,
        thumbnails=args.thumbnails,
        quiet=args.json,
        metrics=args.metrics,
        official_processes=args.official_processes,
        official_batch=args.official_batch,
    )
    return evaluate_list(config, out, options, performance=found)


def _share_out(args: argparse.Namespace, config: Config, out: Path) -> Performance | None:
    """Has all videos scored by several processes; gives their performance."""
    from kineticlip.evaluation.parts import remove_run
    from kineticlip.evaluation.processes import evaluate_in_processes
    from kineticlip.evaluation.run import listed_videos

    _, listed = listed_videos(config)
    if args.fresh:
        remove_run(out)
    return evaluate_in_processes(
        config,
        out,
        [entry.name for entry in listed.entries[: args.limit]],
        processes=args.num_processes,
        thumbnails=args.thumbnails,
        settings={"limit": args.limit, "keep_scores": args.scores or bool(args.metrics)},
        progress=not args.json,
    )
