"""The report's document: plain JSON made from results folders, every shown number in it.

The page shows nothing that is not here, and the document is embedded in the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kineticlip.evaluation import metrics
from kineticlip.evaluation.fingerprint import is_untrained
from kineticlip.evaluation.results import Results
from kineticlip.evaluation.rows import VideoRow, confusion_of, with_one_label
from kineticlip.evaluation.speed import STAGES
from kineticlip.runtime.journal import Json

# More of these would be read by nobody; what is left out is counted in the page.
MAX_PAIRS = 12
MAX_MISTAKES = 15
MAX_BAD = 200
# Up to this many classes a matrix has names at its sides and its cosines are in the document.
MAX_LABELLED = 48
# With fewer classes a histogram of the accuracies says less than the table.
MIN_HISTOGRAM = 20


def build_document(runs: Sequence[Results], *, title: str) -> Json:
    """The document of a page over one or several runs, in the given order."""
    names = _distinct_names(runs)
    described = [describe_run(run, name) for run, name in zip(runs, names, strict=True)]
    for index, entry in enumerate(described):
        entry["difference"] = _difference(runs, index)
    return {"format": 1, "title": title, "runs": described}


def describe_run(run: Results, name: str) -> Json:
    """Everything the page shows of one run but its pictures."""
    summary = dict(run.summary)
    class_names: list[str] = summary.pop("class_names")
    protocol: Json = summary.get("protocol", {})
    labelled = with_one_label(run.rows)
    confusion = confusion_of(labelled, len(class_names))
    per_class = _per_class(confusion)
    accuracies = [entry["accuracy"] for entry in per_class if entry["accuracy"] is not None]
    bad = [{"video": row.video, "reason": row.reason} for row in run.rows if row.status == "bad"]
    classifier = run.classifier()
    return {
        "name": name,
        "summary": summary,
        "class_names": class_names,
        "untrained": is_untrained(protocol),
        "chance": 100 / len(class_names) if class_names else None,
        "waits": _waits(summary.get("speed", {})),
        "per_class": per_class,
        "histogram": _histogram(accuracies) if len(per_class) >= MIN_HISTOGRAM else None,
        "confusion": [[int(t), int(p), int(confusion[t, p])] for t, p in np.argwhere(confusion)],
        "pairs": _confused_pairs(confusion),
        "classifier": None if classifier is None else _classifier(classifier),
        "mistakes": _mistakes(labelled),
        "bad": bad[:MAX_BAD],
        "clips": [],  # filled by the page, which knows which pictures fit
    }


def describe_clip(row: VideoRow, frames: int) -> Json:
    """One video with its best classes, best first; probabilities in percent."""
    return {
        "video": row.video,
        "label": row.label,
        "status": row.status,
        "correct": row.correct,
        "frames": frames,
        "top": [
            {"class": number, "percent": 100 * score}
            for number, score in zip(row.top5, row.top5_scores, strict=True)
        ],
    }


def flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as (dotted key, plain value) in their order; lists count as values."""
    if not isinstance(value, dict):
        return [(prefix, value)]
    pairs = []
    for key, item in value.items():
        pairs += flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return pairs


def unit_rows(classifier: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rows of length 1 [C, E]; a row of zeros stays one."""
    rows = classifier.astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows


def cosines_of(classifier: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of every class with every other [C, C]."""
    rows = unit_rows(classifier)
    cosines: NDArray[np.float64] = np.clip(rows @ rows.T, -1.0, 1.0)
    return cosines


def _distinct_names(runs: Sequence[Results]) -> list[str]:
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    return names


def _per_class(confusion: NDArray[np.int64]) -> list[Json]:
    """One entry a class, in class order: how many, how many right, what it is mistaken for."""
    wrong = _mistaken(confusion)
    accuracies = metrics.class_accuracies(confusion)
    entries = []
    for number, accuracy in enumerate(accuracies):
        other = int(wrong[number].argmax())
        count = int(wrong[number, other])
        entries.append(
            {
                "class": number,
                "videos": int(confusion[number].sum()),
                "correct": int(confusion[number, number]),
                "accuracy": None if np.isnan(accuracy) else float(accuracy),
                "mistaken_for": other if count else None,
                "mistaken_count": count,
            }
        )
    return entries


def _mistaken(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """The counts [C, C] without those of right predictions."""
    return confusion - np.diag(confusion.diagonal())


def _confused_pairs(confusion: NDArray[np.int64]) -> list[Json]:
    """The most frequent mistakes, truth -> prediction, with their share of the truth's videos."""
    wrong = _mistaken(confusion)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_PAIRS]
    pairs = []
    for truth, prediction in zip(*np.unravel_index(order, wrong.shape), strict=True):
        count = int(wrong[truth, prediction])
        if count:
            share = 100 * count / int(confusion[truth].sum())
            pairs.append(
                {
                    "truth": int(truth),
                    "prediction": int(prediction),
                    "count": count,
                    "share": share,
                }
            )
    return pairs


def _mistakes(labelled: Sequence[VideoRow]) -> list[Json]:
    """Wrong predictions, the most confident first."""
    wrong = sorted(
        (row for row in labelled if not row.correct), key=lambda row: -row.top5_scores[0]
    )
    return [
        {
            "video": row.video,
            "label": row.label,
            "prediction": row.top5[0],
            "percent": 100 * row.top5_scores[0],
        }
        for row in wrong[:MAX_MISTAKES]
    ]


def _histogram(accuracies: Sequence[float]) -> list[int]:
    """Number of classes per ten points of accuracy; 100 is in the last of the ten."""
    counts, _ = np.histogram(accuracies, bins=10, range=(0, 100))
    return [int(count) for count in counts]


def _classifier(classifier: NDArray[np.float32]) -> Json:
    """Cosines between the classifier's rows: the map's data and the closest pairs."""
    cosines = cosines_of(classifier)
    first, second = np.triu_indices(len(cosines), k=1)
    between = cosines[first, second]
    closest = np.argsort(-between, kind="stable")[:MAX_PAIRS]
    return {
        "dim": classifier.shape[1],
        "mean": float(between.mean()) if between.size else None,
        "lowest": float(between.min()) if between.size else None,
        "highest": float(between.max()) if between.size else None,
        "cosines": np.round(cosines, 3).tolist() if len(cosines) <= MAX_LABELLED else None,
        "pairs": [
            {"a": int(first[n]), "b": int(second[n]), "cosine": float(between[n])} for n in closest
        ],
    }


def _waits(speed: Json) -> list[Json]:
    """Percent of the wall time the loop waited for each stage, and the rest."""
    given = [(what, speed.get(f"{what}_percent")) for what in STAGES]
    waits = [{"what": what, "percent": percent} for what, percent in given if percent is not None]
    if not waits:
        return []
    rest = 100 - sum(percent for _, percent in given if percent is not None)
    return [*waits, {"what": "other", "percent": max(0.0, rest)}]


def _difference(runs: Sequence[Results], index: int) -> Json | None:
    """Top-1 against the first run of the same list and labels, on the videos both scored."""
    key = _same_videos(runs[index])
    if key is None:
        return None
    first = next(number for number, run in enumerate(runs) if _same_videos(run) == key)
    if first == index:
        return None
    both = [
        (mine.correct, theirs.correct)
        for mine, theirs in zip(runs[index].rows, runs[first].rows, strict=True)
        if mine.status == theirs.status == "ok"
    ]
    if not both:
        return None
    change = [int(mine) - int(theirs) for mine, theirs in both]
    return {
        "against": first,
        "videos": len(both),
        "points": metrics.mean_percent(change),
        "interval": list(metrics.bootstrap_interval(change)),
    }


def _same_videos(run: Results) -> tuple[str, str, int] | None:
    protocol = run.summary.get("protocol", {})
    if "list_sha256" not in protocol or "labels_sha256" not in protocol:
        return None
    return protocol["list_sha256"], protocol["labels_sha256"], len(run.rows)
