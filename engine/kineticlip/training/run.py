"""A training run from its configuration: lists, model, loader, validation, loop, closing words."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import nn

from kineticlip.config import Config
from kineticlip.data.entries import VideoList
from kineticlip.data.labels import read_labels
from kineticlip.data.list_writer import write_few_shot
from kineticlip.data.lists import training_list
from kineticlip.data.training_loader import TrainLoader
from kineticlip.evaluation.feature_store import FeatureClips, open_store
from kineticlip.methods import method_named
from kineticlip.methods.method import Method
from kineticlip.methods.trunk import statistics_of
from kineticlip.runtime.distributed import Ranks, gather, initialise
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_atomic
from kineticlip.runtime.journal import dump_json
from kineticlip.training.job import FINISHED, WEIGHTS, Job, Outcome, check_settings
from kineticlip.training.loop import train
from kineticlip.training.validation import Validation


def check_inputs(config: Config, *, world_size: int) -> None:
    """UserError for settings and lists that are wrong, before a process is started."""
    method_named(config.method)
    check_settings(config, world_size=world_size, cuda=torch.cuda.is_available())
    if not config.data.labels:
        raise UserError("data.labels is not set: training needs the names of the classes")
    training_list(config, len(read_labels(config.data.labels)))


def finished(config: Config, resume: str) -> bool:
    """Whether the run has ended already, which is then said."""
    if resume != "auto" or not (config.output_dir / FINISHED).exists():
        return False
    print(f"{config.output_dir}: the run is finished; weights: {config.output_dir / WEIGHTS}")
    return True


def run_rank(config: Config, ranks: Ranks, *, resume: str = "auto", official: str = "") -> None:
    """Trains as one process of `ranks`; the first one prints how it went.

    resume and official are those of `train`. Raises UserError for what check_inputs refuses.
    """
    check_inputs(config, world_size=ranks.world_size)
    if finished(config, resume):
        return
    class_names = read_labels(config.data.labels)
    listed = training_list(config, len(class_names))
    method = method_named(config.method)
    device = initialise(ranks)
    model = method.build(config, class_names)
    loader = _loader(config, method, model, listed=listed, ranks=ranks, device=device)
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
    job = Job(
        config=config,
        method=method,
        model=model,
        loader=loader,
        ranks=ranks,
        device=device,
        class_names=class_names,
        classifier=asdict(config.classifier),
        validate=validate,
    )
    outcome = train(job, resume=resume, official=official)
    bad = {name: video.reason for name, video in loader.bad.items()}
    everybodys = {name: why for share in gather(bad, ranks) for name, why in share.items()}
    if ranks.is_first:
        _report(config, outcome, everybodys)


def _loader(
    config: Config,
    method: Method,
    model: nn.Module,
    *,
    listed: VideoList,
    ranks: Ranks,
    device: torch.device,
) -> TrainLoader | FeatureClips:
    """Clips of the list, or their stored features."""
    if config.data.features:
        store = open_store(config, method, model, any_views=True)
        return FeatureClips(store, listed.entries, config, rank=ranks.rank, world=ranks.world_size)
    return TrainLoader(
        listed.entries,
        config,
        statistics=statistics_of(model),
        pipeline=method.pipeline,
        rank=ranks.rank,
        world=ranks.world_size,
        pin_memory=device.type == "cuda",
    )


def _report(config: Config, outcome: Outcome, unreadable: Mapping[str, str]) -> None:
    if unreadable:
        path = config.output_dir / "unreadable.json"
        write_atomic(path, dump_json(unreadable, indent=1))
        print(
            f"{len(unreadable)} videos could not be read and were replaced by others: {path}",
            file=sys.stderr,
        )
    for name, value in outcome.evaluation.items():
        print(f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}")
    print(f"{outcome.step} steps; weights: {outcome.weights}")
