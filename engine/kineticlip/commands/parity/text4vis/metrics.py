"""Numbers from scores: zero-shot splits and both kinds of mAP, against the official ones."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from kineticlip.commands.parity.check import Check, compare, exactly
from kineticlip.commands.parity.text4vis.files import Golden
from kineticlip.evaluation import metrics

PERCENT = 1e-4  # of accuracies and of mAPs without ties; the official ones are float32
TIES = 0.7  # of mAPs whose ties the official unstable sort orders as it happens


def zero_shot_checks(golden: Golden) -> Iterator[Check]:
    """Top-1 and top-5 among all classes and among the ten halves."""
    recorded = golden.arrays("zeroshot")
    scores = 100 * recorded["video_features"] @ recorded["text_features"].T
    splits = len(recorded["split_top1"])
    found = metrics.zero_shot(scores, recorded["labels"], splits=splits)
    mean_top1, std_top1 = found.half_top1_mean_std
    mean_top5, std_top5 = found.half_top5_mean_std
    for name, value in {
        "full_top1": found.top1,
        "full_top5": found.top5,
        "split_top1": found.half_top1,
        "split_top5": found.half_top5,
        "mean_top1": mean_top1,
        "std_top1": std_top1,
        "mean_top5": mean_top5,
        "std_top5": std_top5,
    }.items():
        yield compare(f"zeroshot/{name}", value, recorded[name], atol=PERCENT)
    for split in range(splits):
        classes = metrics.half_classes(scores.shape[1], split)
        yield exactly(f"zeroshot/split{split}", classes, recorded[f"split{split}_classes"])
    printed = re.findall(
        r"Overall Top1 (\S+)% Top5 (\S+)%", golden.json("misc_log")["zeroshot_stdout"]
    )
    yield exactly("zeroshot/printed", [(f"{found.top1:.3f}", f"{found.top5:.3f}")], printed)


def map_checks(golden: Golden) -> Iterator[Check]:
    """ActivityNet's mAP: the official double softmax, and the clean ones."""
    recorded = golden.arrays("map")
    scores, labels = recorded["similarity"], recorded["labels"]
    official = metrics.official_mean_average_precision(scores, labels)
    free = metrics.official_mean_average_precision(recorded["tiefree_similarity"], labels)
    once = np.exp(scores.astype(np.float64))
    twice = once / once.sum(axis=1, keepdims=True)
    classes = labels[:, None] == np.arange(scores.shape[1])
    exact = float(metrics.average_precision(twice, classes, ties="listed").mean())
    clean = float(metrics.average_precision(scores, classes).mean())
    for name, value, tolerance in (
        ("stable_sort_fp32_mAP", official, PERCENT),
        ("mAP_official", official, TIES),
        ("tiefree_mAP_official", free, PERCENT),
        ("float64_mAP", exact, PERCENT),
        ("mAP_single_softmax", clean, TIES),
        ("top1", metrics.topk_accuracy(scores, labels), PERCENT),
        ("top5", metrics.topk_accuracy(scores, labels, k=5), PERCENT),
        ("top1_from_map_fn", metrics.topk_accuracy(scores, labels), PERCENT),
    ):
        yield compare(f"map/{name}", value, recorded[name], atol=tolerance)


def multilabel_checks(golden: Golden) -> Iterator[Check]:
    """mAP of rows with several labels each, without a softmax."""
    recorded = golden.arrays("map_multilabel")
    scores, targets = recorded["scores"], recorded["targets"]
    each = metrics.average_precision(scores, targets, ties="listed")
    yield compare("map_multilabel/ap", each, 100 * recorded["ap"], atol=PERCENT)
    yield compare("map_multilabel/mAP", each.mean(), 100 * recorded["mAP"], atol=PERCENT)
