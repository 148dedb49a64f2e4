"""Numbers from scores: accuracy, mAP, zero-shot splits, intervals. Every result is in percent.

N videos, C classes. Scores are [N, C], higher is better, on any monotonic scale; ties go to the
lower class number, so results do not depend on a sort. Where published numbers follow a quirk of
the official code (Text4Vis, BIKE), the quirk is a function of its own and says so in its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kineticlip.runtime.errors import UserError

Floats = NDArray[np.floating]
Integers = NDArray[np.int64]


def rank_of_label(scores: ArrayLike, labels: ArrayLike) -> Integers:
    """How many classes score above each label, [N] from [N, C] and [N]; 0 is a correct top-1.

    Raises UserError when a score is NaN: every comparison with it would be false, and wrong.
    """
    matrix, truth = _scores(scores), _labels(labels)
    own = np.take_along_axis(matrix, truth[:, None], axis=1)  # [N, 1]
    earlier = np.arange(matrix.shape[1]) < truth[:, None]  # [N, C]
    ahead = (matrix > own) | ((matrix == own) & earlier)  # [N, C]
    ranks: Integers = ahead.sum(axis=1, dtype=np.int64)
    return ranks


def top_classes(scores: ArrayLike, k: int = 5) -> Integers:
    """The k best classes of each row, best first: [N, min(k, C)] from [N, C]."""
    return np.argsort(-_scores(scores), axis=1, kind="stable")[:, :k].astype(np.int64)


def topk_accuracy(scores: ArrayLike, labels: ArrayLike, *, k: int = 1) -> float:
    """Share of rows [N, C] whose label is among the k best; k above C counts as C. NaN if N = 0."""
    return mean_percent(rank_of_label(scores, labels) < k)


def mean_percent(values: ArrayLike) -> float:
    """100 times the mean; NaN of nothing."""
    numbers = np.asarray(values, dtype=np.float64)
    return 100 * float(numbers.mean()) if numbers.size else float("nan")


def confusion_matrix(predictions: ArrayLike, labels: ArrayLike, *, num_classes: int) -> Integers:
    """Counts [C, C], truth down, prediction across."""
    cells = _labels(labels) * num_classes + _labels(predictions)
    counts = np.bincount(cells, minlength=num_classes * num_classes).astype(np.int64)
    return counts.reshape(num_classes, num_classes)  # [C, C]


def class_accuracies(confusion: ArrayLike) -> NDArray[np.float64]:
    """Accuracy of each class [C] from a confusion matrix [C, C]; NaN for a class without videos."""
    counts = np.asarray(confusion, dtype=np.float64)
    videos = counts.sum(axis=1)
    accuracies = np.full(len(counts), np.nan)
    np.divide(100 * counts.diagonal(), videos, out=accuracies, where=videos > 0)
    return accuracies


def mean_class_accuracy(confusion: ArrayLike) -> float:
    """Mean over the classes that have videos; NaN when none has."""
    accuracies = class_accuracies(confusion)
    present = accuracies[~np.isnan(accuracies)]
    return float(present.mean()) if present.size else float("nan")


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of `mean_percent(values [N])`: (low, high); NaNs of nothing.

    Pass hits (0 or 1 per video) for an accuracy, or the difference of two runs' hits on the same
    videos for a paired comparison. Equal values give an interval of width 0, whatever N is.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not numbers.size:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, 4_000_000 // numbers.size)  # 32 MB of indices at a time
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        draws = rng.integers(numbers.size, size=(count, numbers.size))
        means[start : start + count] = numbers[draws].mean(axis=1)
    tail = 50 * (1 - level)
    low, high = np.percentile(100 * means, [tail, 100 - tail])
    return float(low), float(high)


def average_precision(
    scores: ArrayLike, targets: ArrayLike, *, ties: Literal["grouped", "listed"] = "grouped"
) -> NDArray[np.float64]:
    """Non-interpolated average precision of each class [C] from scores and 0/1 targets [N, C].

    The mean, over a class's positives, of the precision at their rank; 0 without a positive.
    ties "grouped": equal scores share the precision at the end of their group, so the order of
    the rows is irrelevant. "listed": equal scores keep the order of the rows (torchnet's APMeter
    with a stable sort).
    """
    matrix, truth = _scores(scores), np.asarray(targets, dtype=np.float64)
    order = np.argsort(-matrix, axis=0, kind="stable")  # [N, C]
    truth = np.take_along_axis(truth, order, axis=0)
    rows = np.arange(len(matrix))[:, None]  # [N, 1]
    precision = truth.cumsum(axis=0) / (rows + 1)  # [N, C]
    if ties == "grouped":
        ranked = np.take_along_axis(matrix, order, axis=0)
        ends = np.ones(ranked.shape, dtype=bool)
        ends[:-1] = ranked[:-1] != ranked[1:]
        ends_at = np.where(ends, rows, len(matrix))
        last = np.minimum.accumulate(ends_at[::-1], axis=0)[::-1]  # [N, C]
        precision = np.take_along_axis(precision, last, axis=0)
    total = (precision * truth).sum(axis=0)
    precisions: NDArray[np.float64] = 100 * total / np.maximum(truth.sum(axis=0), 1)
    return precisions


def mean_average_precision(scores: ArrayLike, targets: ArrayLike) -> float:
    """mAP over the classes that have a positive; targets are labels [N] or 0/1 [N, C]."""
    matrix = _scores(scores)
    truth = _targets(targets, matrix.shape[1])
    present = truth.any(axis=0)
    if not present.any():
        return float("nan")
    return float(average_precision(matrix[:, present], truth[:, present]).mean())


def official_mean_average_precision(similarity: ArrayLike, labels: ArrayLike) -> float:
    """ActivityNet's mAP as Text4Vis prints it (utils/utils.py, mean_average_precision).

    `similarity` [N, C] is a softmax already, and the official code takes another one in float32.
    That changes the ranking across videos and makes exact ties of tiny probabilities; its sort
    is unstable, ours is stable. The mean runs over all classes, those without a video count 0.
    """
    from torch import from_numpy  # the ties depend on torch's own float32 softmax

    matrix = _scores(similarity).astype(np.float32)
    twice = from_numpy(matrix).softmax(dim=1).numpy()
    truth = _targets(labels, matrix.shape[1])
    return float(average_precision(twice, truth, ties="listed").mean())


def official_running_mean_average_precision(
    scores: ArrayLike, targets: ArrayLike, *, batch_size: int
) -> float:
    """Charades' mAP as BIKE prints it (test_charades.py): not the mAP of the whole set.

    After every batch of rows the mAP of all rows so far is taken (classes without a positive
    count 0), and these values are averaged, weighted by the size of their batch.
    """
    matrix = _scores(scores)
    truth = _targets(targets, matrix.shape[1])
    total = 0.0
    for start in range(0, len(matrix), batch_size):
        stop = min(start + batch_size, len(matrix))
        value = average_precision(matrix[:stop], truth[:stop], ties="listed").mean()
        total += float(value) * (stop - start)
    return total / len(matrix) if len(matrix) else float("nan")


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Accuracy among all classes, and among half of them for ten fixed halves."""

    top1: float
    top5: float
    half_top1: tuple[float, ...]
    half_top5: tuple[float, ...]

    @property
    def half_top1_mean_std(self) -> tuple[float, float]:
        return float(np.mean(self.half_top1)), float(np.std(self.half_top1))  # ddof 0

    @property
    def half_top5_mean_std(self) -> tuple[float, float]:
        return float(np.mean(self.half_top5)), float(np.std(self.half_top5))  # ddof 0


def half_classes(num_classes: int, seed: int) -> Integers:
    """Half of the classes [C // 2], as the official splits draw them: numpy's legacy generator."""
    return np.random.RandomState(seed).permutation(num_classes)[: num_classes // 2].astype(np.int64)


def check_half_classes(num_classes: int, labels: ArrayLike, *, splits: int = 10) -> None:
    """UserError where one of the halves has no video, which leaves it without an accuracy."""
    truth = _labels(labels)
    for split in range(splits):
        if not np.isin(truth, half_classes(num_classes, split)).any():
            raise UserError(
                f"zero-shot: half-class split {split} of {num_classes} classes holds none of "
                f"the {len(truth)} videos; this protocol needs more classes or more videos"
            )


def zero_shot(scores: ArrayLike, labels: ArrayLike, *, splits: int = 10) -> ZeroShot:
    """The zero-shot protocol of Text4Vis (test_zeroshot.py, multi_split_test).

    Split s keeps the videos of `half_classes(C, s)` and ranks only the classes of that half that
    have a video. Raises UserError when a half holds no video at all.
    """
    matrix, truth = _scores(scores), _labels(labels)
    check_half_classes(matrix.shape[1], truth, splits=splits)
    top1, top5 = [], []
    for split in range(splits):
        chosen = np.isin(truth, half_classes(matrix.shape[1], split))
        present, renumbered = np.unique(truth[chosen], return_inverse=True)
        ranks = rank_of_label(matrix[chosen][:, present], renumbered)
        top1.append(mean_percent(ranks < 1))
        top5.append(mean_percent(ranks < 5))
    ranks = rank_of_label(matrix, truth)
    return ZeroShot(
        top1=mean_percent(ranks < 1),
        top5=mean_percent(ranks < 5),
        half_top1=tuple(top1),
        half_top5=tuple(top5),
    )


def official_padded_accuracy(
    hits: ArrayLike, *, world_size: int, seed: int = 0, shuffle: bool = True
) -> float:
    """The accuracy that `world_size` official test processes print for hits [N].

    Their DistributedSampler repeats the first videos of its (shuffled) order until every process
    has as many; the repeated ones count twice. All processes hold equally many videos, so the
    official mean over processes and batches is the mean over the padded list.
    """
    from torch import Generator, randperm  # the order is that of torch's generator

    values = np.asarray(hits, dtype=np.float64)
    if not values.size:
        return float("nan")
    order = np.arange(values.size)
    if shuffle:
        order = randperm(values.size, generator=Generator().manual_seed(seed)).numpy()
    padded = -(-values.size // world_size) * world_size
    return mean_percent(values[np.resize(order, padded)])


def _scores(scores: ArrayLike) -> Floats:
    matrix = np.asarray(scores)
    if matrix.ndim != 2:
        raise UserError(f"scores should be [videos, classes], got shape {list(matrix.shape)}")
    if not np.issubdtype(matrix.dtype, np.floating):
        matrix = matrix.astype(np.float64)
    if np.isnan(matrix).any():
        row = int(np.isnan(matrix).any(axis=1).argmax())
        raise UserError(f"scores: row {row} holds NaN; the model overflowed or diverged")
    return matrix


def _labels(labels: ArrayLike) -> Integers:
    return np.asarray(labels).astype(np.int64).reshape(-1)


def _targets(targets: ArrayLike, num_classes: int) -> NDArray[np.bool_]:
    """0/1 [N, C] as bool, or labels [N] as one-hot rows."""
    given = np.asarray(targets)
    if given.ndim == 2:
        return given.astype(bool)
    one_hot: NDArray[np.bool_] = _labels(given)[:, None] == np.arange(num_classes)
    return one_hot
