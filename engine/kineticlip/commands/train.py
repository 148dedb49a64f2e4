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
        help="auto: the newest checkpoint in the output folder; never: start afresh; PATH: a "
        "checkpoint, a run, or a .pth of the official EVL or Vita-CLIP code (with its optimiser)",
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="start N processes on this machine with DeepSpeed's launcher",
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
    from kineticlip.training.job import FINISHED
    from kineticlip.training.run import check_inputs, finished

    if args.config is None:
        raise UserError("--config is not set: training needs a configuration")
    config = load_config(args.config, args.set)
    config, resume, official = starting_point(config, args.resume)
    ranks = read_ranks(os.environ)
    if args.num_processes is None:
        return _rank_program(config, ranks, args, resume=resume, official=official)
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


def _rank_program(
    config: Config, ranks: Ranks, args: argparse.Namespace, *, resume: str, official: str
) -> int:
    """What each process does; one of several has its own way out (distributed.finish)."""
    import os
    import sys
    import traceback

    from kineticlip.runtime.distributed import end_with, finish
    from kineticlip.runtime.errors import UserError
    from kineticlip.training.run import run_rank

    if ranks.world_size == 1:
        run_rank(config, ranks, resume=resume, official=official)
        return 0
    end_with(args.started_by or os.getppid())
    status = 0
    try:
        run_rank(config, ranks, resume=resume, official=official)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BaseException:  # also what ends a process by design: no other way out is safe
        traceback.print_exc()
        status = 1
    return finish(status, ranks)
