"""`kineticlip attributes extract|train|fuse`: BIKE's second branch, from text alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kineticlip.commands.options import add_config_options, add_model_options, configured
from kineticlip.runtime.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="extract|train|fuse", required=True)
    extract = actions.add_parser("extract", help="take the top-5 classes of every video")
    extract.add_argument("results", metavar="DIR", help="results folder of a zero-shot evaluation")
    extract.add_argument("--out", required=True, metavar="FILE", help="JSON file to write")
    train = actions.add_parser("train", help="train a head on attributes of data.train_list")
    train.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    fuse = actions.add_parser("fuse", help="score attributes and fuse with a video branch")
    fuse.add_argument(
        "results", metavar="DIR", help="results of the video branch, from eval --scores"
    )
    fuse.add_argument("--head", required=True, metavar="FILE", help="file written by `train`")
    fuse.add_argument(
        "--share", type=float, default=0.7, metavar="X", help="weight of the video branch (0.7)"
    )
    fuse.add_argument("--json", action="store_true", help="print one JSON document")
    for action in (train, fuse):
        action.add_argument(
            "--attributes", required=True, metavar="FILE", help="attributes of the videos"
        )
        add_config_options(action)
        add_model_options(action)


def run(args: argparse.Namespace) -> int:
    return {"extract": _extract, "train": _train, "fuse": _fuse}[args.action](args)


def _extract(args: argparse.Namespace) -> int:
    from kineticlip.evaluation.results import read_results
    from kineticlip.training.attributes import write_attributes

    rows = read_results(args.results).rows
    found = {row.video: row.top5_names for row in rows if row.status == "ok"}
    write_attributes(found, args.out)
    print(f"{args.out}: attributes of {len(found)} of {len(rows)} videos")
    return 0


def _train(args: argparse.Namespace) -> int:
    from safetensors.torch import save

    from kineticlip.data.labels import read_labels
    from kineticlip.data.lists import training_list
    from kineticlip.evaluation.metrics import topk_accuracy
    from kineticlip.evaluation.recognizer import pick_device
    from kineticlip.runtime.files import write_atomic
    from kineticlip.training.attributes import (
        encode_attributes,
        encode_names,
        fit,
        read_attributes,
        score,
    )

    if not args.out.endswith(".safetensors"):
        raise UserError(f"--out: expected a .safetensors file, got {args.out}")
    config, device = configured(args), pick_device()
    names = read_labels(config.data.labels)
    entries = training_list(config, len(names)).entries
    listing = [(entry.name, entry.label) for entry in entries]
    attributes = read_attributes(args.attributes)
    videos = encode_attributes(config, listing, attributes, args.attributes, device)
    classes = encode_names(config, names, device=device)
    head = fit(config, videos, classes)
    write_atomic(Path(args.out), save(head.state_dict()))
    scores = score(head, videos.sentences, classes)
    top1 = topk_accuracy(scores.numpy(), videos.labels.numpy())
    print(f"{args.out}: trained on {len(listing)} videos, top-1 on them {top1:.2f} %")
    return 0


def _fuse(args: argparse.Namespace) -> int:
    import torch

    from kineticlip.data.labels import read_labels
    from kineticlip.evaluation.metrics import topk_accuracy
    from kineticlip.evaluation.recognizer import pick_device
    from kineticlip.evaluation.results import read_results
    from kineticlip.training.attributes import (
        encode_attributes,
        encode_names,
        fuse,
        load_head,
        read_attributes,
        score,
    )

    config, device = configured(args), pick_device()
    names = read_labels(config.data.labels)
    results = read_results(args.results)
    kept = results.scores()
    if kept is None or kept.shape[1] != len(names):
        raise UserError(
            f"{args.results}: no scores over {len(names)} classes; evaluate with --scores"
        )
    good = [row.status == "ok" for row in results.rows]
    video_scores = torch.from_numpy(kept[good])
    listing = [(row.video, row.label) for row in results.rows if row.status == "ok"]
    attributes = read_attributes(args.attributes)
    videos = encode_attributes(config, listing, attributes, args.attributes, device)
    classes = encode_names(config, names, device=device)
    sentence_scores = score(load_head(args.head, classes.shape[1]), videos.sentences, classes)
    branches = {
        "video": video_scores,
        "attributes": sentence_scores,
        "fused": fuse(video_scores, sentence_scores, share=args.share),
    }
    labels = videos.labels.numpy()
    found = {
        name: {f"top{k}": topk_accuracy(scores.numpy(), labels, k=k) for k in (1, 5)}
        for name, scores in branches.items()
    }
    if args.json:
        print(json.dumps({"videos": len(listing), "share": args.share, **found}))
        return 0
    for name, accuracy in found.items():
        print(f"{name:<11} top-1 {accuracy['top1']:6.2f} %   top-5 {accuracy['top5']:6.2f} %")
    return 0
