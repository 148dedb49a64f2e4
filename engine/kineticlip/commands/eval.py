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

LEAST = {"official_processes": 1, "official_batch": 1, "limit": 1, "thumbnails": 0}
PROTOCOL = """
views and precision are keys of the configuration:
  --set test.clips=4 --set test.crops=3 --set eval.precision=int8   (fp32, bf16; GPU: fp16, fp8)"""
METRICS = ("zero-shot", "map", "multilabel", "official-padded")  # evaluation.protocols.PROTOCOLS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    add_model_options(parser)
    parser.add_argument("--list", metavar="FILE", help="videos to score; default data.val_list")
    parser.add_argument("--root", metavar="DIR", help="folder of the listed paths")
    parser.add_argument(
        "--split",
        nargs=2,
        action="append",
        metavar=("FILE", "NAMES"),
        help="a list and its own class names (e.g. kinetics-600-split1), in place of --list and "
        "--labels; repeatable: each is scored, then the mean and deviation over all",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        choices=METRICS,
        metavar="NAME",
        help=f"further numbers: {', '.join(METRICS)}",
    )
    parser.add_argument(
        "--official-processes",
        type=int,
        default=8,
        metavar="N",
        help="official-padded: how many processes shared the list (8)",
    )
    parser.add_argument(
        "--official-batch",
        type=int,
        default=1,
        metavar="N",
        help="multilabel: videos a batch of the official running mean (1)",
    )
    parser.epilog = f"{parser.epilog}\n{PROTOCOL}"
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N videos")
    parser.add_argument("--features", metavar="DIR", help="what kineticlip features wrote of them")
    parser.add_argument("--out", metavar="DIR", help="results folder; default <output>/eval")
    parser.add_argument("--fresh", action="store_true", help="drop results that are there already")
    parser.add_argument("--scores", action="store_true", help="keep every video's scores")
    parser.add_argument("--thumbnails", type=int, default=12, metavar="N", help="pictures to keep")
    parser.add_argument("--deterministic", action="store_true", help="repeat to the byte")
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="share the videos among N processes of this machine: one a GPU, or of its cores",
    )
    parser.add_argument("--part-of-run", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    from kineticlip.runtime.errors import UserError

    if args.part_of_run:
        return _run_part()
    for name, least in LEAST.items():
        given = getattr(args, name)
        if given is not None and given < least:
            raise UserError(f"--{name.replace('_', '-')} should be at least {least}, got {given}")
    if args.split:
        return _run_splits(args)
    config = _configured(args)
    out = Path(args.out) if args.out else config.output_dir / "eval"
    summary = _evaluate(args, config, out)
    if args.json:
        json.dump({"results": str(out), **summary}, sys.stdout, indent=1)
        print()
    else:
        print("\n".join(describe(summary)))
        print(f"results: {out}")
    return 0 if summary["scored"] else 1


def _run_part() -> int:
    """A process of evaluate_in_processes: scores the share that its parent hands it."""
    from kineticlip.config import config_from_dict
    from kineticlip.evaluation.processes import Order, write_speed
    from kineticlip.evaluation.run import ListOptions, evaluate_share
    from kineticlip.runtime.distributed import end_with

    order = Order.loaded(sys.stdin.read())
    end_with(order.parent, poll_seconds=0.2)
    part = Path(order.part)
    config = config_from_dict(order.config, "the parent process")
    options = ListOptions(**{**order.settings, "quiet": True})
    speed = evaluate_share(config, part, options, videos=order.videos, whole=Path(order.out))
    write_speed(part, speed)
    return 0


def _run_splits(args: argparse.Namespace) -> int:
    """Every split into a folder of its own; splits.json beside them has mean and deviation."""
    from kineticlip.evaluation.protocols import describe_splits, over_splits
    from kineticlip.evaluation.run import listed_videos
    from kineticlip.runtime.errors import UserError
    from kineticlip.runtime.files import write_atomic
    from kineticlip.runtime.journal import dump_json

    if args.list is not None or args.labels is not None:
        raise UserError(
            "--split brings its own list and class names; leave out --list and --labels"
        )
    configs = []
    for listing, labels in args.split:
        args.list, args.labels = listing, labels
        configs.append(_configured(args))
        listed_videos(configs[-1])  # a mistake in the last list shows before the first is scored
    out, summaries = Path(args.out) if args.out else configs[0].output_dir / "eval", []
    for number, config in enumerate(configs, 1):
        listing = config.data.val_list
        summary = _evaluate(args, config, out / f"split{number}")
        summaries.append(summary)
        if not args.json:
            print(f"split {number}: {listing}")
            print("\n".join(f"  {line}" for line in describe(summary)))
    splits = [{"list": listing, "labels": labels} for listing, labels in args.split]
    combined = over_splits(summaries)
    document = {"splits": splits, "over_splits": combined}
    write_atomic(out / "splits.json", dump_json(document, indent=1))
    if args.json:
        json.dump({"results": str(out), **document}, sys.stdout, indent=1)
        print()
    else:
        print("\n".join(describe_splits(combined)))
        print(f"results: {out}")
    return 0


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

    speed = _share_out(args, config, out) if args.num_processes is not None else None
    options = ListOptions(
        limit=args.limit,
        fresh=args.fresh and speed is None,
        keep_scores=args.scores,
        thumbnails=args.thumbnails,
        quiet=args.json,
        metrics=args.metrics,
        official_processes=args.official_processes,
        official_batch=args.official_batch,
    )
    return evaluate_list(config, out, options, speed=speed)


def _share_out(args: argparse.Namespace, config: Config, out: Path) -> dict[str, Any]:
    """Has all videos scored by several processes; gives their speed."""
    from kineticlip.evaluation.processes import evaluate_in_processes, remove_run
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


def describe(summary: dict[str, Any]) -> list[str]:
    """The summary in a few lines for a person."""
    from kineticlip.config import EIGHT_BITS
    from kineticlip.evaluation.protocols import describe_extra

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
    elif summary["scored"]:
        lines.append("no accuracy: no video that was scored has one label")
    else:
        lines.append("no video could be read; is --root right?")
    videos, classes = _plural(summary["scored"], "video"), _plural(summary["classes"], "class")
    views = (_plural(protocol[f"{what}s"], what) for what in ("clip", "crop", "frame"))
    lines.append(f"{videos} of {classes}, {' x '.join(views)}")
    extra = summary["extra"]
    eight = next((name for name in EIGHT_BITS if name in extra), None)
    if eight is not None:
        delta = extra[eight]
        lines.append(
            f"{eight} against bf16 on one view of {delta['videos']} videos: "
            f"top-1 equal in {delta['top1_agreement']:.0f} %, top-5 set in "
            f"{delta['top5_agreement']:.0f} %; scores differ by at most "
            f"{delta['score_difference']:.1e}"
        )
    lines += describe_extra({key: value for key, value in extra.items() if key != eight})
    if summary["bad"]:
        reasons = "; ".join(f"{count} x {why}" for why, count in summary["bad_reasons"].items())
        bad = _plural(summary["bad"], "video")
        lines.append(f"{bad} could not be decoded, not counted: {reasons}")
        lines += [f"  {name}" for name in summary["bad_videos"]]
        if summary["bad"] > len(summary["bad_videos"]):
            lines.append("  and others; results.parquet names all")
    if summary["repeated"]:
        lines.append(f"lines of the list that repeat a video: {summary['repeated']}")
    speed = summary["speed"]
    if speed.get("videos"):
        waits = ", ".join(
            f"{what} {speed[f'{what}_percent']:.0f} %" for what in ("decode", "transfer", "compute")
        )
        lines.append(
            f"{speed['videos_per_second']:.2f} videos/s, "
            f"{speed['images_per_second']:.1f} images/s, "
            f"{_model_share(speed)}; waiting: {waits}"
        )
        lines.append(f"{speed['tower']}; {speed['chunk']} images a forward")
        decoders = ", ".join(f"{name} {count}" for name, count in summary["decoders"].items())
        lines.append(f"decoded by {decoders} ({speed['decoding']}); bad files: {summary['bad']}")
        lines += [f"  {count} of them {why}" for why, count in summary["fallbacks"].items()]
    return lines


def _plural(count: int, word: str) -> str:
    ending = "" if count == 1 else "es" if word.endswith("s") else "s"
    return f"{count} {word}{ending}"


def _model_share(speed: dict[str, Any]) -> str:
    if speed["percent_of_model_speed"] is None:
        return "the model alone not timed (one group takes too long)"
    return f"{speed['percent_of_model_speed']:.0f} % of the model alone"
