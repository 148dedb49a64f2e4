"""A run over a list of videos: from the configuration to a results folder and its summary."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kineticlip.config import EIGHT_BITS, Config
from kineticlip.data.batch import BadVideo, VideoViews
from kineticlip.data.device_loader import DeviceLoader, why_not_on_device
from kineticlip.data.entries import Entry, VideoList
from kineticlip.data.labels import read_labels
from kineticlip.data.lists import scoring_list
from kineticlip.data.scoring_loader import ScoringLoader
from kineticlip.evaluation.feature_store import FeatureViews, open_store
from kineticlip.evaluation.loop import evaluate_videos
from kineticlip.evaluation.processes import check_same_run, remove_run, take_over_parts
from kineticlip.evaluation.protocols import check_protocols, collect, measure
from kineticlip.evaluation.ready import make_steady
from kineticlip.evaluation.recognizer import Recognizer, compare_first, load_recognizer, pick_device
from kineticlip.evaluation.results import ResultWriter, earlier_summary, protocol_fingerprint
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.machine import machine_record

Loader = ScoringLoader | DeviceLoader | FeatureViews


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """What a run over a list does besides what its configuration says.

    metrics: names of protocols.PROTOCOLS, whose numbers become the summary's `extra`; they need
    every score, so scores are kept. The official ones are settings of runs to compare with.
    """

    limit: int | None = None  # only the first videos of the list
    fresh: bool = False  # drops results that are there already
    keep_scores: bool = False
    thumbnails: int = 0
    quiet: bool = False
    metrics: Sequence[str] = ()
    official_processes: int = 8
    official_batch: int = 1


@dataclass(frozen=True, kw_only=True)
class _Run:
    """An open results folder and the model that fills it."""

    recognizer: Recognizer
    listed: VideoList
    entries: Sequence[Entry]
    writer: ResultWriter
    options: ListOptions


def listed_videos(config: Config) -> tuple[tuple[str, ...], VideoList]:
    """Class names and videos of a configuration. Raises UserError where it names none."""
    if not config.data.labels:
        raise UserError("data.labels is not set: give --labels a label file or a built-in name")
    class_names = read_labels(config.data.labels)
    return class_names, scoring_list(config, len(class_names))


def evaluate_list(
    config: Config,
    out: Path,
    options: ListOptions,
    *,
    speed: dict[str, Any] | None = None,
    recognizer: Recognizer | None = None,
) -> dict[str, Any]:
    """Scores the videos of data.val_list that have no result in `out` yet; gives the summary.

    speed: of the processes that have scored the list already. Where nothing was left to score, the
    summary keeps the speed, and what was compared, of the run that did the work. recognizer: of
    this configuration, loaded already, with class names of its own.
    """
    if not options.fresh:
        take_over_parts(out)
    with _opened(config, out, options, recognizer) as run:
        here, extra = _score(run, run.entries)
        speed = dict(speed or here)
        extra.update(speed.pop("extra", {}))
        if not speed["videos"]:
            earlier = earlier_summary(out, run.writer.fingerprint)
            speed = earlier.get("speed") or speed
            compared = earlier.get("extra", {})
            extra |= {name: compared[name] for name in EIGHT_BITS if name in compared}
        if run.listed.empty:
            extra["entries_without_frames"] = len(run.listed.empty)
        if run.listed.short:
            extra["entries_left_out_as_short"] = len(run.listed.short)
        if options.metrics:
            found = collect(
                run.writer.scores(),
                run.entries,
                world_size=options.official_processes,
                batch_size=options.official_batch,
            )
            extra |= measure(options.metrics, found)
        return run.writer.finish(machine=machine_record(), speed=speed, extra=extra)


def evaluate_share(
    config: Config, part: Path, options: ListOptions, *, videos: Collection[str], whole: Path
) -> dict[str, Any]:
    """Scores these videos of the list into a part of the run in the folder `whole`.

    Gives the speed, with what the summary should have as `extra`; writes no result files.
    """
    with _opened(config, part, options) as run:
        check_same_run(whole, part)
        wanted = set(videos)
        here, extra = _score(run, [entry for entry in run.entries if entry.name in wanted])
        return {**here, "extra": extra}


@contextmanager
def _opened(
    config: Config, out: Path, options: ListOptions, recognizer: Recognizer | None = None
) -> Iterator[_Run]:
    if recognizer is None:
        class_names, listed = listed_videos(config)
    else:
        class_names = recognizer.class_names
        listed = scoring_list(config, len(class_names))
    entries = listed.entries[: options.limit]
    if not entries:
        raise UserError(f"{config.data.val_list}: no video to score; {listed.summary()}")
    check_protocols(options.metrics, entries, num_classes=len(class_names))
    if listed.empty or listed.short:
        print(listed.summary(), file=sys.stderr)
    recognizer = recognizer or load_recognizer(
        config, class_names, device=pick_device(), with_reference=not config.data.features
    )
    listing = [(entry.name, entry.label) for entry in entries]
    protocol = protocol_fingerprint(
        config, listing, class_names=class_names, weights=recognizer.weights
    )
    if options.fresh:
        remove_run(out)
    with ResultWriter.open(
        out,
        protocol,
        entries=listing,
        class_names=class_names,
        keep_scores=options.keep_scores or bool(options.metrics),
        root="" if config.data.features else config.data.val_root,
    ) as writer:
        yield _Run(
            recognizer=recognizer, listed=listed, entries=entries, writer=writer, options=options
        )


def _score(run: _Run, entries: Sequence[Entry]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores the entries that have no result yet; (speed, what the summary should say besides)."""
    recognizer, config, writer = run.recognizer, run.recognizer.config, run.writer
    if recognizer.classifier is not None:
        writer.save_classifier(recognizer.classifier.numpy())
    distinct = {entry.name: entry for entry in entries}  # a list may repeat a video
    done = writer.done
    todo = [entry for name, entry in distinct.items() if name not in done]
    loader, decoding = _loader(recognizer, todo)
    stream: Iterable[VideoViews | BadVideo] = loader
    chunk, tower = recognizer.chunk, ["features"]
    extra: dict[str, Any] = {}
    if todo and not isinstance(loader, FeatureViews):
        if recognizer.reference is not None:
            stream, extra[config.eval.precision] = compare_first(recognizer, loader)
        views = config.data.num_frames * config.test.clips * config.test.crops
        chunk, tower = make_steady(
            recognizer.model,
            config,
            device=recognizer.device,
            chunk=chunk,
            images=views * len(todo),
        )
    clock = evaluate_videos(
        recognizer.model,
        recognizer.method,
        stream,
        writer,
        total=len(todo),
        done=len(distinct) - len(todo),
        device=recognizer.device,
        chunk=chunk,
        tower=", ".join(tower),
        thumbnails=0 if isinstance(loader, FeatureViews) else run.options.thumbnails,
        one_by_one=config.eval.deterministic,
        progress=not run.options.quiet and bool(todo),
    )
    return {**clock.summary(), "decoding": decoding}, extra


def _loader(recognizer: Recognizer, todo: Sequence[Entry]) -> tuple[Loader, str]:
    """Where the views come from, and why from there."""
    config, rules = recognizer.config, recognizer.method.pipeline
    if config.data.features:
        store = open_store(config, recognizer.method, recognizer.model)
        return FeatureViews(store, todo), "features"
    why_not = why_not_on_device(config, recognizer.device)
    if why_not:
        return ScoringLoader(
            todo, config, statistics=recognizer.statistics, pipeline=rules
        ), why_not
    loader = DeviceLoader(
        todo,
        config,
        device=recognizer.device,
        statistics=recognizer.statistics,
        pipeline=rules,
    )
    return loader, loader.choice
