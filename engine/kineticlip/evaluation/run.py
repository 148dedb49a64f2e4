"""A run over a list of videos: from the configuration to a results folder and its summary."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kineticlip.config import Config
from kineticlip.data.batch import BadVideo, VideoViews
from kineticlip.data.device_loader import DeviceLoader, why_not_on_device
from kineticlip.data.entries import Entry, VideoList
from kineticlip.data.labels import read_labels
from kineticlip.data.lists import scoring_list
from kineticlip.data.scoring_loader import ScoringLoader
from kineticlip.evaluation.comparison import compare_first
from kineticlip.evaluation.feature_store import FeatureViews, open_store
from kineticlip.evaluation.fingerprint import protocol_fingerprint
from kineticlip.evaluation.parts import check_same_run, remove_run, take_over_parts
from kineticlip.evaluation.protocols import check_protocols, collect, protocol_numbers
from kineticlip.evaluation.recognizer import Recognizer, load_recognizer, pick_device
from kineticlip.evaluation.result_writer import ResultWriter
from kineticlip.evaluation.results import SUMMARY, earlier_summary
from kineticlip.evaluation.scoring import evaluate_videos
from kineticlip.evaluation.speed import Agreement, Performance, Speed
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.machine import machine_record

ViewStream = ScoringLoader | DeviceLoader | FeatureViews


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
class _OpenEvaluation:
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
    performance: Performance | None = None,
    recognizer: Recognizer | None = None,
) -> dict[str, Any]:
    """Scores the videos of data.val_list that have no result in `out` yet; gives the summary.

    performance: of the processes that have scored the list already. Where nothing was left to
    score, the summary keeps the speed, and what was compared, of the run that did the work.
    recognizer: of this configuration, loaded already, with class names of its own.
    """
    if not options.fresh:
        take_over_parts(out)
    with _opened(config, out, options, recognizer) as evaluation:
        here = _score(evaluation, evaluation.entries)
        performance = performance or here
        if not performance.speed.videos:
            performance = _earlier_performance(out, evaluation) or performance
        return evaluation.writer.finish(
            machine=machine_record(),
            speed=performance.speed,
            extra=_extra(evaluation, performance.agreement),
        )


def evaluate_share(
    config: Config, part: Path, options: ListOptions, *, videos: Collection[str], whole: Path
) -> Performance:
    """Scores these videos of the list into a part of the run in the folder `whole`.

    Writes no result files.
    """
    with _opened(config, part, options) as evaluation:
        check_same_run(whole, part)
        wanted = set(videos)
        return _score(evaluation, [e for e in evaluation.entries if e.name in wanted])


@contextmanager
def _opened(
    config: Config, out: Path, options: ListOptions, recognizer: Recognizer | None = None
) -> Iterator[_OpenEvaluation]:
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
        yield _OpenEvaluation(
            recognizer=recognizer, listed=listed, entries=entries, writer=writer, options=options
        )


def _score(evaluation: _OpenEvaluation, entries: Sequence[Entry]) -> Performance:
    """Scores the entries that have no result yet."""
    recognizer, writer, options = evaluation.recognizer, evaluation.writer, evaluation.options
    config = recognizer.config
    if recognizer.classifier is not None:
        writer.save_classifier(recognizer.classifier.numpy())
    distinct = {entry.name: entry for entry in entries}  # a list may repeat a video
    done = writer.done
    todo = [entry for name, entry in distinct.items() if name not in done]
    views, decoding = _view_stream(recognizer, todo)
    stream: Iterable[VideoViews | BadVideo] = views
    agreement: Agreement | None = None
    if isinstance(views, FeatureViews):
        # The trunk does not run, and the store holds no pixels.
        recognizer = replace(recognizer, ready=replace(recognizer.ready, notes=("features",)))
        options = replace(options, thumbnails=0)
    elif todo:
        if recognizer.ready.reference is not None:
            stream, agreement = compare_first(recognizer.ready, recognizer.method, views)
        images = config.data.num_frames * config.test.clips * config.test.crops * len(todo)
        recognizer = recognizer.for_run(images)
    clock = evaluate_videos(
        recognizer,
        stream,
        writer,
        total=len(todo),
        done=len(distinct) - len(todo),
        thumbnails=options.thumbnails,
        progress=not options.quiet and bool(todo),
    )
    speed = clock.speed(tower=", ".join(recognizer.ready.notes), decoding=decoding)
    return Performance(speed=speed, agreement=agreement)


def _view_stream(recognizer: Recognizer, todo: Sequence[Entry]) -> tuple[ViewStream, str]:
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


def _earlier_performance(out: Path, evaluation: _OpenEvaluation) -> Performance | None:
    """What an earlier run of the same protocol wrote into its summary."""
    summary = earlier_summary(out, evaluation.writer.fingerprint)
    if not summary.get("speed"):
        return None
    compared = summary.get("extra", {}).get(evaluation.recognizer.config.eval.precision)
    return Performance(
        speed=Speed.from_json(summary["speed"], str(out / SUMMARY)),
        agreement=Agreement(**compared) if compared else None,
    )


def _extra(evaluation: _OpenEvaluation, agreement: Agreement | None) -> dict[str, Any]:
    """What the summary should say besides accuracy, counts and speed."""
    options, listed = evaluation.options, evaluation.listed
    extra: dict[str, Any] = {}
    if agreement is not None:
        extra[evaluation.recognizer.config.eval.precision] = agreement.to_json()
    if listed.empty:
        extra["entries_without_frames"] = len(listed.empty)
    if listed.short:
        extra["entries_left_out_as_short"] = len(listed.short)
    if options.metrics:
        found = collect(
            evaluation.writer.scores(),
            evaluation.entries,
            world_size=options.official_processes,
            batch_size=options.official_batch,
        )
        extra |= protocol_numbers(options.metrics, found)
    return extra
