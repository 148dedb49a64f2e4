"""Scoring the validation list between epochs: every rank its share, one view a video."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kineticlip.config import Config, ViewConfig
from kineticlip.data.entries import Entry
from kineticlip.data.lists import scoring_list
from kineticlip.data.scoring_loader import ScoringLoader
from kineticlip.evaluation.feature_store import FeatureViews, open_store
from kineticlip.evaluation.loop import Scored, score_stream
from kineticlip.evaluation.metrics import mean_average_precision, topk_accuracy
from kineticlip.evaluation.protocols import targets_of
from kineticlip.evaluation.ready import ready
from kineticlip.methods.method import Method
from kineticlip.methods.trunk import statistics_of
from kineticlip.runtime.distributed import Ranks, gather
from kineticlip.runtime.errors import UserError


class Validation:
    """A copy of the model that takes over the trained weights and scores data.val_list.

    Call it as train.Validate. The copy runs in eval.precision, so it scores what a later
    evaluation of the exported weights would. One clip and one crop a video, as the official
    training codes validate; `kineticlip eval` gives the numbers of all views. Raises UserError
    for a list that cannot be read, at once.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        *,
        model: nn.Module,
        num_classes: int,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.entries: Sequence[Entry] = scoring_list(config, num_classes).entries
        if not any(entry.labels or entry.label >= 0 for entry in self.entries):
            raise UserError(f"{config.data.val_list}: no labels to validate against")
        self._method, self._ranks, self._device = method, ranks, device
        view = ViewConfig(clips=1, crops=1, sampling=config.test.sampling)
        self._loader: ScoringLoader | FeatureViews
        if config.data.features:  # these have the views that they have
            store = open_store(config, method, model, any_views=True)
            self._loader = FeatureViews(store, self.entries, ranks.rank, ranks.world_size)
        else:
            self._loader = ScoringLoader(
                self.entries,
                replace(config, test=view),
                statistics=statistics_of(model),
                pipeline=method.pipeline,
                rank=ranks.rank,
                world=ranks.world_size,
            )
        self._config = config
        self._twin = copy.deepcopy(model)
        self._chunk = 0  # images per forward, once the twin is ready

    def __call__(self, model: nn.Module, step: int) -> Mapping[str, Any]:
        """top1 and top5 in percent, or mAP for videos with several labels; every rank calls it."""
        if not self._chunk:
            found = ready(self._twin, self._config, device=self._device, packed=False)
            self._chunk = found.chunk
        self._twin.load_state_dict(model.state_dict())
        shares = gather(self._own_scores(), self._ranks)
        scored = {number: scores for share in shares for number, scores in share.items()}
        result: dict[str, Any] = {
            "videos": len(scored),
            "unreadable": len(self.entries) - len(scored),
        }
        if scored:
            result |= self._measured(sorted(scored.items()))
        return result

    def _own_scores(self) -> dict[int, NDArray[np.float32]]:
        """Place in the list -> probabilities [C], for this rank's videos that can be read."""
        places = range(self._ranks.rank, len(self.entries), self._ranks.world_size)
        stream = score_stream(
            self._twin, self._method, self._loader, device=self._device, chunk=self._chunk
        )
        return {
            place: item.scores.numpy()
            for place, item in zip(places, stream, strict=True)
            if isinstance(item, Scored)
        }

    def _measured(self, scored: Sequence[tuple[int, NDArray[np.float32]]]) -> dict[str, float]:
        scores = np.stack([row for _, row in scored])  # [N, C]
        entries = [self.entries[number] for number, _ in scored]
        if any(entry.labels is not None for entry in entries):
            return {"mAP": mean_average_precision(scores, targets_of(entries, scores.shape[1]))}
        labels = [entry.label for entry in entries]
        return {f"top{k}": topk_accuracy(scores, labels, k=k) for k in (1, 5)}
