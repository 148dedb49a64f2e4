"""`kineticlip train`: one process, the rank program of a launcher, or the one that starts it.

    kineticlip train --config C                              one process
    kineticlip train --config C --num-processes 8            starts the deepspeed launcher itself
    deepspeed --module kineticlip train --config C           several nodes: the launcher's options

The same command goes on with a run that was interrupted, and is content with a finished one.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kineticlip.commands.options import add_config_options

if TYPE_CHECKING:
    from kineticlip.config import Config
    from kineticlip.runtime.distributed import Ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="the newest checkpoint of the output (auto), none, or that of a checkpoint or run; "
        "a .pth of the official EVL or Vita-CLIP code goes on with its weights and optimiser",
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="start N processes on this machine with the deepspeed launcher",
    )
    parser.add_argument("--started-by", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    import os

    from kineticlip.config import load_config
    from kineticlip.runtime.distributed import Ranks, read_ranks
    from kineticlip.runtime.errors import UserError
    from kineticlip.runtime.launch import launch
    from kineticlip.training.adopt import starting_point
    from kineticlip.training.checkpoint import find_resumable
    from kineticlip.training.loop import FINISHED

    if args.config is None:
        raise UserError("--config is not set: training needs a configuration")
    config = load_config(args.config, args.set)
    config, resume, start = starting_point(config, args.resume)
    ranks = read_ranks(os.environ)
    if args.num_processes is None:
        return _rank_program(config, ranks, args, resume=resume, start=start)
    if args.num_processes < 1:
        raise UserError(f"--num-processes should be at least 1, got {args.num_processes}")
    if ranks.world_size > 1:
        raise UserError("--num-processes: a launcher started this process already; leave it out")
    check_inputs(config, world_size=args.num_processes)
    find_resumable(resume, config.output_dir, config, Ranks(world_size=args.num_processes))
    if finished(config, resume):
        return 0
    words = ["train", "--config", args.config, "--resume", args.resume]
    words += [word for pair in args.set for word in ("--set", pair)]
    return launch(words, processes=args.num_processes, mark=config.output_dir / FINISHED)


def check_inputs(config: Config, *, world_size: int) -> None:
    """UserError for settings and lists that are wrong, before a process is started."""
    import torch

    from kineticlip.data.labels import read_labels
    from kineticlip.data.lists import training_list
    from kineticlip.methods import method_named
    from kineticlip.runtime.errors import UserError
    from kineticlip.training.loop import check_settings

    method_named(config.method)
    check_settings(config, world_size=world_size, cuda=torch.cuda.is_available())
    if not config.data.labels:
        raise UserError("data.labels is not set: training needs the names of the classes")
    training_list(config, len(read_labels(config.data.labels)))


def finished(config: Config, resume: str) -> bool:
    """Whether the run has ended already, which is then said."""
    from kineticlip.training.loop import FINISHED, WEIGHTS

    if resume != "auto" or not (config.output_dir / FINISHED).exists():
        return False
    print(f"{config.output_dir}: the run is finished; weights: {config.output_dir / WEIGHTS}")
    return True


def _rank_program(
    config: Config, ranks: Ranks, args: argparse.Namespace, *, resume: str, start: str
) -> int:
    """What each process does; one of several has its own way out (distributed.finish)."""
    import os
    import sys
    import traceback

    from kineticlip.runtime.distributed import end_with, finish
    from kineticlip.runtime.errors import UserError

    if ranks.world_size == 1:
        return _train(config, ranks, resume, start)
    end_with(args.started_by or os.getppid())
    try:
        status = _train(config, ranks, resume, start)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BaseException:  # also what ends a process by design: no other way out is safe
        traceback.print_exc()
        status = 1
    return finish(status, ranks)


def _train(config: Config, ranks: Ranks, resume: str, start: str) -> int:
    import sys
    from dataclasses import asdict

    from kineticlip.data.few_shot import write_few_shot
    from kineticlip.data.labels import read_labels
    from kineticlip.data.lists import training_list
    from kineticlip.data.loader import TrainLoader
    from kineticlip.evaluation.feature_store import FeatureClips, open_store
    from kineticlip.methods import method_named
    from kineticlip.runtime.distributed import gather, initialise
    from kineticlip.runtime.journal import dump_json, write_atomic
    from kineticlip.training.loop import train
    from kineticlip.training.validation import Validation

    check_inputs(config, world_size=ranks.world_size)
    if finished(config, resume):
        return 0
    class_names = read_labels(config.data.labels)
    listed = training_list(config, len(class_names))
    method = method_named(config.method)
    device = initialise(ranks)
    model = method.build(config, class_names)
    loader: TrainLoader | FeatureClips
    if config.data.features:
        store = open_store(config, method, model, any_views=True)
        loader = FeatureClips(
            store, listed.entries, config, rank=ranks.rank, world=ranks.world_size
        )
    else:
        loader = TrainLoader(
            listed.entries,
            config,
            pipeline=method.pipeline,
            rank=ranks.rank,
            world=ranks.world_size,
            pin_memory=device.type == "cuda",
        )
    validate = None
    if config.data.val_list:
        validate = Validation(
            config,
            method,
            model=model,
            num_classes=len(class_names),
            ranks=ranks,
            device=device,
        )
    if ranks.is_first:
        print(listed.summary(), file=sys.stderr)
        if config.data.shots:
            print(f"few-shot videos: {write_few_shot(config, listed.entries)}", file=sys.stderr)
    outcome = train(
        config,
        method,
        model=model,
        loader=loader,
        ranks=ranks,
        device=device,
        class_names=class_names,
        classifier=asdict(config.classifier),
        validate=validate,
        resume=resume,
        start=start,
    )
    bad = {name: video.reason for name, video in loader.bad.items()}
    everybodys = {name: why for share in gather(bad, ranks) for name, why in share.items()}
    if not ranks.is_first:
        return 0
    if everybodys:
        path = config.output_dir / "unreadable.json"
        write_atomic(path, dump_json(everybodys, indent=1))
        print(
            f"{len(everybodys)} videos could not be read, others took their places: {path}",
            file=sys.stderr,
        )
    for name, value in outcome.evaluation.items():
        print(f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}")
    print(f"{outcome.step} steps; weights: {outcome.weights}")
    return 0
