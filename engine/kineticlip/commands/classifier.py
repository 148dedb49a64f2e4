"""`kineticlip classifier build|show`: frozen classifier files and what is in them."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from kineticlip.errors import UserError

if TYPE_CHECKING:
    from kineticlip.classifier import Classifier
    from kineticlip.config import Config

KINDS = ("text", "random_normal", "random_orthogonal", "sentence", "lda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="build|show", required=True)
    build = actions.add_parser("build", help="write a classifier file", allow_abbrev=False)
    build.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    build.add_argument("--output", required=True, metavar="FILE", help="a .safetensors file")
    build.add_argument("--config", metavar="YAML", help="model, classifier and data.labels of it")
    build.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key"
    )
    build.add_argument("--labels", metavar="FILE", help="class names, in place of data.labels")
    sentence = build.add_argument_group("sentence: rows of a language model on this machine")
    sentence.add_argument("--model", metavar="FOLDER", help="as transformers' save_pretrained")
    sentence.add_argument("--pooling", choices=("mean", "first"), default="mean")
    sentence.add_argument(
        "--projection",
        choices=("orthogonal", "pca"),
        default="orthogonal",
        help="for a model of another width than the embeddings",
    )
    lda = build.add_argument_group("lda: rows of linear discriminant analysis")
    lda.add_argument(
        "--embeddings",
        metavar="FILE",
        help=".safetensors with `embeddings` [N, E] and `labels` [N]",
    )
    lda.add_argument(
        "--shrinkage", default="auto", metavar="X", help="auto (Ledoit-Wolf), or 0 to 1"
    )
    show = actions.add_parser("show", help="print what a classifier file holds")
    show.add_argument("file", metavar="FILE")
    for action in (build, show):
        action.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from kineticlip.classifier import load_classifier, save_classifier

    if args.action == "show":
        built = load_classifier(args.file)
    else:
        if not args.output.endswith(".safetensors"):
            raise UserError(f"--output: expected a .safetensors file, got {args.output}")
        built = _build(args)
        save_classifier(built, args.output)
    classes, embed = built.matrix.shape
    if args.json:
        names = list(built.names)
        print(json.dumps({"names": names, "embed": embed, "provenance": built.provenance}))
        return 0
    print(f"{args.file if args.action == 'show' else args.output}: {classes} classes x {embed}")
    for key, value in built.provenance.items():
        print(f"  {key}: {value}")
    return 0


def _build(args: argparse.Namespace) -> Classifier:
    from dataclasses import replace

    from kineticlip.classifier import build_classifier
    from kineticlip.config import load_config
    from kineticlip.dataset import read_labels

    config = load_config(args.config, args.set)
    labels = args.labels or config.data.labels
    if not labels:
        raise UserError("no class names: give --labels FILE, or data.labels in the config")
    names = read_labels(labels)
    if args.kind == "sentence":
        return _sentence(args, config, names)
    if args.kind == "lda":
        return _lda(args, names)
    config = replace(config, classifier=replace(config.classifier, source=args.kind))
    return build_classifier(config, names)


def _sentence(args: argparse.Namespace, config: Config, names: tuple[str, ...]) -> Classifier:
    from kineticlip.architectures import architecture
    from kineticlip.classifier import sentence_classifier

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


def _lda(args: argparse.Namespace, names: tuple[str, ...]) -> Classifier:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from kineticlip.classifier import lda_classifier

    if not args.embeddings:
        raise UserError("classifier build lda: give --embeddings FILE")
    try:
        stored = load_file(args.embeddings)
        embeddings, labels = stored["embeddings"].float().numpy(), stored["labels"].numpy()
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{args.embeddings}: no file of embeddings and labels: {error}") from None
    try:
        shrinkage = args.shrinkage if args.shrinkage == "auto" else float(args.shrinkage)
    except ValueError:
        raise UserError(f"--shrinkage: expected auto or a number, got {args.shrinkage}") from None
    return lda_classifier(embeddings, labels, names, shrinkage=shrinkage)
