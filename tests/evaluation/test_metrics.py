"""Metrics against the outputs of the official codes, and against definitions written out."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from kineticlip.evaluation import metrics
from kineticlip.runtime.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "text4vis"


def golden(name: str) -> dict[str, NDArray[np.generic]]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def random_scores(n: int = 60, c: int = 7, seed: int = 0) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, c)).astype(np.float32), rng.integers(c, size=n)


def test_topk_accuracy_matches_the_official_code() -> None:
    data = golden("map")
    for k in (1, 5):
        value = metrics.topk_accuracy(data["similarity"], data["labels"], k=k)
        assert value == pytest.approx(float(data[f"top{k}"]), rel=1e-6)  # official: float32


def test_k_is_clamped_and_ties_go_to_the_lower_class() -> None:
    scores = np.array([[0.5, 0.5, 0.0], [0.2, 0.4, 0.4], [0.1, 0.1, 0.1]])
    assert metrics.topk_accuracy(scores, [1, 1, 2], k=1) == pytest.approx(100 / 3)
    assert metrics.topk_accuracy(scores, [1, 1, 2], k=2) == pytest.approx(200 / 3)
    assert metrics.topk_accuracy(scores, [1, 1, 2], k=9) == 100
    assert metrics.top_classes(scores, 2).tolist() == [[0, 1], [1, 2], [0, 1]]
    assert metrics.top_classes(scores, 9).shape == (3, 3)


def test_ranks_agree_with_the_sorted_classes() -> None:
    scores, labels = random_scores()
    scores = np.round(scores, 1)  # many ties
    ranks = metrics.rank_of_label(scores, labels)
    order = metrics.top_classes(scores, 7)
    assert all(order[row, rank] == labels[row] for row, rank in enumerate(ranks))


def test_nan_scores_are_refused_and_nothing_is_nan() -> None:
    scores, labels = random_scores()
    scores[3, 2] = np.nan
    with pytest.raises(UserError, match="row 3 holds NaN"):
        metrics.topk_accuracy(scores, labels)
    with pytest.raises(UserError, match=r"\[videos, classes\]"):
        metrics.top_classes(scores[0])
    assert np.isnan(metrics.topk_accuracy(np.empty((0, 3)), []))


def test_confusion_and_class_accuracies() -> None:
    confusion = metrics.confusion_matrix([0, 0, 1, 1, 2], [0, 0, 0, 1, 1], num_classes=4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    accuracies = metrics.class_accuracies(confusion)
    assert accuracies[:2] == pytest.approx([200 / 3, 50])
    assert np.isnan(accuracies[2:]).all()
    assert metrics.mean_class_accuracy(confusion) == pytest.approx((200 / 3 + 50) / 2)
    assert np.isnan(metrics.mean_class_accuracy(np.zeros((3, 3))))


def test_official_map_matches_the_official_code() -> None:
    data = golden("map")
    value = metrics.official_mean_average_precision(data["similarity"], data["labels"])
    assert value == pytest.approx(float(data["stable_sort_fp32_mAP"]), abs=1e-5)
    # The official value itself moves with its unstable sort.
    assert value == pytest.approx(float(data["mAP_official"]), abs=0.7)
    value = metrics.official_mean_average_precision(data["tiefree_similarity"], data["labels"])
    assert value == pytest.approx(float(data["tiefree_mAP_official"]), abs=1e-5)


def test_clean_map_ranks_the_scores_as_they_are() -> None:
    data = golden("map")
    labels, scores = data["labels"], data["similarity"]
    present = np.unique(labels)
    expected = [average_precision_score(labels == c, scores[:, c]) for c in present]
    value = metrics.mean_average_precision(scores, labels)
    assert value == pytest.approx(100 * np.mean(expected), abs=1e-9)
    # torchnet's value for the same scores: scores of exactly 1.0 tie, and its sort is unstable.
    assert value == pytest.approx(float(data["mAP_single_softmax"]), abs=0.7)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    again = metrics.mean_average_precision(scores[shuffled], labels[shuffled])
    assert again == pytest.approx(value, abs=1e-9)


def test_double_softmax_in_float64_has_no_ties() -> None:
    data = golden("map")
    once = data["similarity"].astype(np.float64)
    twice = np.exp(once) / np.exp(once).sum(axis=1, keepdims=True)
    targets = data["labels"][:, None] == np.arange(once.shape[1])
    value = metrics.average_precision(twice, targets, ties="listed").mean()
    assert value == pytest.approx(float(data["float64_mAP"]), abs=1e-9)


def test_multi_label_map_matches_torchnet() -> None:
    data = golden("map_multilabel")
    values = metrics.average_precision(data["scores"], data["targets"])
    assert values == pytest.approx(100 * data["ap"].astype(np.float64), abs=1e-4)
    value = metrics.mean_average_precision(data["scores"], data["targets"])
    assert value == pytest.approx(100 * float(data["mAP"]), abs=1e-4)


def test_tied_scores_share_the_precision_of_their_group() -> None:
    scores, targets = [[0.5], [0.5], [0.5], [0.1]], [[0], [1], [0], [1]]
    assert metrics.average_precision(scores, targets)[0] == pytest.approx(50 * (1 / 3 + 2 / 4))
    listed = metrics.average_precision(scores, targets, ties="listed")[0]
    assert listed == pytest.approx(50 * (1 / 2 + 2 / 4))
    assert metrics.average_precision([[0.3], [0.2]], [[0], [0]])[0] == 0


def test_running_map_is_the_weighted_mean_of_the_prefixes() -> None:
    data = golden("map_multilabel")
    scores, targets = data["scores"][:25], data["targets"][:25]
    prefix = [metrics.average_precision(scores[:n], targets[:n]).mean() for n in (10, 20, 25)]
    value = metrics.official_running_mean_average_precision(scores, targets, batch_size=10)
    assert value == pytest.approx((10 * prefix[0] + 10 * prefix[1] + 5 * prefix[2]) / 25)
    whole = metrics.official_running_mean_average_precision(scores, targets, batch_size=25)
    assert whole == pytest.approx(prefix[2])


def test_zero_shot_matches_the_official_code() -> None:
    data = golden("zeroshot")
    scores = 100 * data["video_features"] @ data["text_features"].T
    result = metrics.zero_shot(scores, data["labels"])
    assert result.top1 == pytest.approx(float(data["full_top1"]), rel=1e-6)
    assert result.top5 == pytest.approx(float(data["full_top5"]), rel=1e-6)
    assert result.half_top1 == pytest.approx(list(data["split_top1"]), rel=1e-6)
    assert result.half_top5 == pytest.approx(list(data["split_top5"]), rel=1e-6)
    mean, std = result.half_top1_mean_std
    assert (mean, std) == pytest.approx((float(data["mean_top1"]), float(data["std_top1"])))
    mean, std = result.half_top5_mean_std
    assert (mean, std) == pytest.approx((float(data["mean_top5"]), float(data["std_top5"])))
    for split in range(10):
        classes = metrics.half_classes(scores.shape[1], split)
        assert classes.tolist() == data[f"split{split}_classes"].tolist()


def test_zero_shot_needs_videos_in_every_half() -> None:
    with pytest.raises(UserError, match="split 0 of 1 classes holds none"):
        metrics.zero_shot([[0.3], [0.2]], [0, 0])


def test_bootstrap_interval_is_seeded_and_covers() -> None:
    rng = np.random.default_rng(1)
    hits = rng.random(400) < 0.7
    low, high = metrics.bootstrap_interval(hits)
    assert (low, high) == metrics.bootstrap_interval(hits)
    assert (low, high) != metrics.bootstrap_interval(hits, seed=1)
    mean = 100 * hits.mean()
    normal = 196 * np.sqrt(hits.mean() * (1 - hits.mean()) / 400)
    assert (low, high) == pytest.approx((mean - normal, mean + normal), abs=0.6)
    narrow = metrics.bootstrap_interval(hits, level=0.5)
    assert low < narrow[0] < mean < narrow[1] < high
    assert metrics.bootstrap_interval([1, 1, 1]) == (100, 100)
    assert np.isnan(metrics.bootstrap_interval([])).all()


def test_bootstrap_of_long_lists_is_drawn_in_pieces() -> None:
    low, high = metrics.bootstrap_interval(np.arange(300_000) % 2, resamples=30)
    assert 49.5 < low < 50 < high < 50.5


@pytest.mark.parametrize(("videos", "world"), [(10, 4), (16, 4), (3, 8), (7, 1)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_padded_accuracy_counts_what_distributed_sampler_hands_out(
    videos: int, world: int, shuffle: bool
) -> None:
    hits = np.random.default_rng(videos).integers(2, size=videos)
    seen: list[int] = []
    for rank in range(world):
        numbers = cast("Dataset[int]", range(videos))  # a length is all that it asks for
        seen += DistributedSampler(numbers, world, rank, shuffle=shuffle)
    value = metrics.official_padded_accuracy(hits, world_size=world, shuffle=shuffle)
    assert value == pytest.approx(100 * hits[seen].mean())


def test_scores_may_be_tensors() -> None:
    scores, labels = random_scores()
    tensor = metrics.topk_accuracy(torch.from_numpy(scores), torch.from_numpy(labels), k=2)
    assert tensor == metrics.topk_accuracy(scores, labels, k=2)
