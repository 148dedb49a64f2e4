"""`kineticlip features`: runs a frozen trunk over a list of videos once and keeps what it gives."""

from __future__ import annotations

import argparse
import json
import sys

from kineticlip.commands.options import add_config_options, add_model_options, configured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    add_model_options(parser)
    parser.add_argument("--list", metavar="FILE", help="list of videos (default: data.val_list)")
    parser.add_argument("--root", metavar="DIR", help="folder that the paths are relative to")
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="output folder; new videos are added to it"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace
    from functools import partial

    from tqdm import tqdm

    from kineticlip.data.scoring_loader import ScoringLoader
    from kineticlip.evaluation.feature_store import cut_of, facts_of
    from kineticlip.evaluation.feature_writer import write_features
    from kineticlip.evaluation.ready import ready
    from kineticlip.evaluation.recognizer import pick_device
    from kineticlip.evaluation.run import listed_videos
    from kineticlip.methods import method_named
    from kineticlip.methods.method import as_video_model
    from kineticlip.methods.trunk import statistics_of
    from kineticlip.runtime.errors import UserError

    config = configured(args)
    if args.list is not None or args.root is not None:
        listed_in = args.list or config.data.val_list
        root = args.root or ("" if args.list else config.data.val_root)
        config = replace(config, data=replace(config.data, val_list=listed_in, val_root=root))
    class_names, listed = listed_videos(config)
    entries = listed.entries
    if not entries:
        raise UserError(f"{config.data.val_list}: no video to encode; {listed.summary()}")
    if listed.empty or listed.short:
        print(listed.summary(), file=sys.stderr)
    method = method_named(config.method)
    model = method.build(config, class_names)
    if "visual" in as_video_model(model).untrained and config.model.weights != "random":
        raise UserError(f"{config.model.weights}: no trained weights for the trunk")
    facts = facts_of(config, method, model)
    found = ready(model, config, device=pick_device(), packed=False)
    with tqdm(total=len(entries), unit="video", disable=args.json) as bar:
        written, bad = write_features(
            args.out,
            partial(
                ScoringLoader,
                config=config,
                statistics=statistics_of(model),
                pipeline=method.pipeline,
            ),
            entries,
            encode=cut_of(config, method, model).encode,
            facts=facts,
            ready=found,
            done=bar.update,
        )
    outcome = {"features": args.out, "rows": facts["rows"], "written": written, "unreadable": bad}
    if args.json:
        json.dump(outcome, sys.stdout)
        print()
    else:
        print(f"{written} videos written ({facts['rows']}), {bad} unreadable: {args.out}")
    return 0
