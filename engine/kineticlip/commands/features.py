"""`kineticlip features`: runs a frozen trunk over a list of videos once and keeps what it gives."""

from __future__ import annotations

import argparse
import json
import sys

from kineticlip.commands.options import add_config_options, add_model_options, configured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)
    add_model_options(parser)
    parser.add_argument("--list", metavar="FILE", help="videos; default data.val_list")
    parser.add_argument("--root", metavar="DIR", help="folder of the listed paths")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of features; it grows")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace
    from functools import partial

    from tqdm import tqdm

    from kineticlip.data.labels import read_labels
    from kineticlip.data.lists import read_list
    from kineticlip.data.loader import TestLoader
    from kineticlip.evaluation.feature_store import cut_of, facts_of
    from kineticlip.evaluation.feature_writer import write_features
    from kineticlip.evaluation.ready import ready
    from kineticlip.evaluation.recognizer import pick_device
    from kineticlip.methods import method_named
    from kineticlip.methods.method import as_video_model
    from kineticlip.runtime.errors import UserError

    config = configured(args)
    if args.list is not None or args.root is not None:
        listed_in = args.list or config.data.val_list
        root = args.root or ("" if args.list else config.data.val_root)
        config = replace(config, data=replace(config.data, val_list=listed_in, val_root=root))
    if not config.data.labels:
        raise UserError("data.labels is not set: give --labels a label file or a built-in name")
    if not config.data.val_list:
        raise UserError("data.val_list is not set: give --list a list of videos")
    class_names = read_labels(config.data.labels)
    entries = read_list(config.data.val_list, config.data.val_root).entries
    method = method_named(config.method)
    model = method.build(config, class_names)
    if "visual" in as_video_model(model).untrained and config.model.weights != "random":
        raise UserError(f"{config.model.weights}: no trained weights for the trunk")
    facts = facts_of(config, method, model)
    found = ready(model, config, device=pick_device(), packed=False)
    with tqdm(total=len(entries), unit="video", disable=args.json) as bar:
        written, bad = write_features(
            args.out,
            partial(TestLoader, config=config, pipeline=method.pipeline),
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
