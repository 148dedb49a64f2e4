"""`kineticlip classifier build|show`: frozen classifier files and what is in them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from kineticlip.commands.options import add_config_options, add_model_options, configured
from kineticlip.runtime.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kineticlip.config import Config
    from kineticlip.models.classifier import Classifier

KINDS = ("text", "random_normal", "random_orthogonal", "sentence", "lda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="build|show", required=True)
    build = actions.add_parser("build", help="write a classifier file", allow_abbrev=False)
    build.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    build.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    add_config_options(build)
    add_model_options(build)
    sentence = build.add_argument_group("sentence: rows from a local language model")
    sentence.add_argument(
        "--model", metavar="FOLDER", help="as written by transformers' save_pretrained"
    )
    sentence.add_argument(
        "--pooling", choices=("mean", "first"), default="mean", help="over the tokens"
    )
    sentence.add_argument(
        "--projection",
        choices=("orthogonal", "pca"),
        default="orthogonal",
        help="if the model's width is not that of the embeddings",
    )
    lda = build.add_argument_group("lda: rows from linear discriminant analysis")
    lda.add_argument(
        "--embeddings",
        metavar="FILE",
        help=".safetensors with `embeddings` [N, E] and `labels` [N]; without it, the videos "
        "of data.train_list are embedded",
    )
    lda.add_argument(
        "--per-class",
        type=int,
        default=60,
        metavar="N",
        help="videos per class from data.train_list (60)",
    )
    lda.add_argument(
        "--shrinkage",
        default="auto",
        metavar="X",
        help="auto (Ledoit-Wolf) or a number from 0 to 1",
    )
    show = actions.add_parser("show", help="print what a classifier file holds")
    show.add_argument("file", metavar="FILE", help="a classifier file")
    for action in (build, show):
        action.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from kineticlip.models.classifier import load_classifier, save_classifier

    if args.action == "show":
        built = load_classifier(args.file)
    else:
        if not args.out.endswith(".safetensors"):
            raise UserError(f"--out: expected a .safetensors file, got {args.out}")
        built = _build(args)
        save_classifier(built, args.out)
    classes, embed = built.matrix.shape
    if args.json:
        names = list(built.names)
        print(json.dumps({"names": names, "embed": embed, "provenance": built.provenance}))
        return 0
    print(f"{args.file if args.action == 'show' else args.out}: {classes} classes x {embed}")
    for key, value in built.provenance.items():
        print(f"  {key}: {value}")
    return 0


def _build(args: argparse.Namespace) -> Classifier:
    from dataclasses import replace

    from kineticlip.data.labels import read_labels
    from kineticlip.methods import method_named
    from kineticlip.models.classifier import build_classifier

    config = configured(args)
    if not config.data.labels:
        raise UserError("no class names: give --labels FILE, or data.labels in the config")
    names = read_labels(config.data.labels)
    if args.kind == "sentence":
        return _sentence(args, config, names)
    if args.kind == "lda":
        return _lda(args, config, names)
    config = replace(config, classifier=replace(config.classifier, source=args.kind))
    return build_classifier(config, names, rounded=method_named(config.method).rounds_clip(config))


def _sentence(args: argparse.Namespace, config: Config, names: tuple[str, ...]) -> Classifier:
    from kineticlip.models.architectures import architecture
    from kineticlip.models.classifier import sentence_classifier

    if not args.model:
        raise UserError("classifier build sentence: give --model FOLDER")
    return sentence_classifier(
        args.model,
        names,
        architecture(config.model.arch).embed,
        template=config.classifier.template,
        pooling=args.pooling,
        projection=args.projection,
        seed=config.classifier.seed,
    )


def _lda(args: argparse.Namespace, config: Config, names: tuple[str, ...]) -> Classifier:
    from dataclasses import replace

    from kineticlip.models.classifier import lda_classifier

    try:
        shrinkage = args.shrinkage if args.shrinkage == "auto" else float(args.shrinkage)
    except ValueError:
        raise UserError(f"--shrinkage: expected auto or a number, got {args.shrinkage}") from None
    find = _stored if args.embeddings else _embedded
    embeddings, labels, origin = find(args, config, names)
    built = lda_classifier(embeddings, labels, names, shrinkage=shrinkage)
    return replace(built, provenance={**built.provenance, **origin})


Labelled = tuple["NDArray[Any]", "NDArray[Any]", dict[str, Any]]  # [N, E], [N], where from


def _stored(args: argparse.Namespace, config: Config, names: tuple[str, ...]) -> Labelled:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(args.embeddings)
        embeddings, labels = stored["embeddings"].float().numpy(), stored["labels"].numpy()
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"{args.embeddings}: not a file of embeddings and labels: {error}"
        ) from None
    return embeddings, labels, {"embeddings": args.embeddings}


def _embedded(args: argparse.Namespace, config: Config, names: tuple[str, ...]) -> Labelled:
    """CLIP's own embeddings, without a temporal header, of some training videos a class."""
    from dataclasses import replace

    from kineticlip.data.few_shot import few_shot
    from kineticlip.data.lists import training_list
    from kineticlip.evaluation.embeddings import video_embeddings
    from kineticlip.evaluation.recognizer import pick_device

    config = replace(config, text4vis=replace(config.text4vis, header="mean"))
    listed = training_list(config, len(names))
    entries = few_shot(listed.entries, args.per_class, config.seed, repeat=False)
    found = video_embeddings(config, entries, device=pick_device(), progress=not args.json)
    for video in found.bad:
        print(f"left out: {video.name}: {video.reason}", file=sys.stderr)
    origin = {
        "arch": config.model.arch,
        "weights": config.model.weights,
        "list": listed.source,
        "list_sha256": listed.sha256,
        "per_class": args.per_class,
        "unreadable": len(found.bad),
    }
    return found.matrix.numpy(), found.labels.numpy(), origin
