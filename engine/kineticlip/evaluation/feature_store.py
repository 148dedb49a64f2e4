"""What a frozen trunk makes of a list of videos, read instead of pixels: heads train in seconds.

A folder, written by `feature_writer`, holds `index.jsonl`, a journal whose first line says what
everything was made with, and shards of tensors; a line of the journal names the videos of one
shard, which is there already.
Letters: U distinct frames and V distinct crops of a video, K clips, T frames, N tokens, D width,
E embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.data.batch import BadVideo, Batch, VideoViews
from kineticlip.data.entries import Entry
from kineticlip.data.order import order_of
from kineticlip.data.pipelines import pipeline_of
from kineticlip.data.statistics import CLIP_STATISTICS
from kineticlip.methods import METHODS
from kineticlip.methods.method import Cut, Method
from kineticlip.methods.trunk import statistics_of
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.journal import first_difference, read_journal

INDEX = "index.jsonl"
FORMAT = 1

Facts = dict[str, Any]


def cut_of(config: Config, method: Method, model: nn.Module) -> Cut:
    """Where this method's trunk is cut. UserError where it cannot be."""
    if method.feature_cut is None:
        others = ", ".join(name for name, other in METHODS.items() if other.feature_cut)
        raise UserError(
            f"method {config.method}: no features (it trains its trunk or shows it whole clips, or "
            f"its text side needs the videos); methods that have them: {others}"
        )
    return method.feature_cut(model)


def facts_of(config: Config, method: Method, model: nn.Module) -> Facts:
    """What features depend on beside the videos: rows of equal facts are interchangeable."""
    data = config.data
    pipeline, statistics = pipeline_of(data, method.pipeline), statistics_of(model)
    normalised = pipeline.dtype == torch.float32 and statistics != CLIP_STATISTICS
    return {
        **({"statistics": [*statistics.mean, *statistics.std]} if normalised else {}),
        "format": FORMAT,
        "rows": cut_of(config, method, model).name,
        "arch": config.model.arch,
        "trunk": _digest(model),
        "pipeline": pipeline.name,
        "num_frames": data.num_frames,
        "resolution": data.resolution,
        "something": data.something,
        "sampling": config.test.sampling,
        "sampling_rate": data.sampling_rate,
        "clips": config.test.clips,
        "crops": config.test.crops,
    }


def _digest(model: nn.Module) -> str:
    """SHA-256 of the trunk's parameters, rounded to the bf16 that it may have been cast to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.get_submodule("visual").state_dict().items()):
        if name != "proj" and not name.startswith("ln_post"):  # EVL's files leave them out
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


class FeatureStore:
    """A folder of features, open for reading. UserError where it does not fit the run.

    any_views: the number and kind of views need not be those of the configuration.
    """

    def __init__(
        self, folder: str | Path, facts: Mapping[str, Any], *, any_views: bool = False
    ) -> None:
        self.folder = Path(folder)
        there, *lines = read_journal(self.folder / INDEX)
        views = ("clips", "crops", "sampling") if any_views else ()
        known = {key: value for key, value in there.items() if key not in views}
        wanted = {key: value for key, value in facts.items() if key not in views}
        if difference := first_difference(known, wanted):
            raise UserError(f"data.features: {folder}: {difference}")
        self.bad: dict[str, str] = {
            name: why for line in lines for name, why in line["bad"].items()
        }
        self._places = {
            name: (line["shard"], place) for line in lines for name, place in line["videos"].items()
        }
        self._open = lru_cache(maxsize=64)(self._open_shard)

    def __contains__(self, name: str) -> bool:
        return name in self._places or name in self.bad

    def read(self, entry: Entry) -> VideoViews | BadVideo:
        """One video's views; images are rows [U, V, ...]. UserError for a missing one."""
        if entry.name in self.bad:
            return BadVideo(entry.name, entry.label, self.bad[entry.name])
        if entry.name not in self._places:
            raise UserError(f"data.features: {self.folder} has no '{entry.name}'")
        shard, place = self._places[entry.name]
        return VideoViews(
            name=entry.name,
            label=entry.label,
            images=self._open(shard).get_tensor(place["key"]),
            frame_index=torch.tensor(place["frame_index"]),
            crop_index=torch.tensor(place["crop_index"]),
            decoder=place["decoder"],
            num_frames=place["num_frames"],
        )

    def _open_shard(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"data.features: {self.folder / name}: {error}") from None


@dataclass(frozen=True)
class FeatureViews:
    """Stands for a ScoringLoader: every world-th entry from rank on, from a store."""

    store: FeatureStore
    entries: Sequence[Entry]
    rank: int = 0
    world: int = 1

    def __iter__(self) -> Iterator[VideoViews | BadVideo]:
        return (self.store.read(entry) for entry in self.entries[self.rank :: self.world])


class FeatureClips:
    """Stands for a TrainLoader: batches in its order, clips [T, ...] from a store.

    Videos have several views: pass p shows view p + index of a video, round and round. Unreadable
    videos are left out of the list.
    """

    def __init__(
        self,
        store: FeatureStore,
        entries: Sequence[Entry],
        config: Config,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        listed = {entry.name: entry.label for entry in entries}
        self.bad = {
            name: BadVideo(name, listed[name], why)
            for name, why in store.bad.items()
            if name in listed
        }
        self.refilled = 0
        self._store = store
        self._good = [entry for entry in entries if entry.name not in self.bad]
        self._order = order_of(self._good, config, rank=rank, world=world)

    def __len__(self) -> int:
        return self._order.batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from micro-batch `start` on; pixels: rows [B, T, ...]."""
        for number in range(epoch * len(self) + start, (epoch + 1) * len(self)):
            places = [self._order.locate(place) for place in self._order.places(number)]
            entries = [self._good[index] for _, index in places]
            yield Batch(
                pixels=torch.stack([self._clip(*place) for place in places]),
                labels=torch.tensor([entry.label for entry in entries]),
                names=tuple(entry.name for entry in entries),
            )

    def _clip(self, turn: int, index: int) -> Tensor:
        video = self._store.read(self._good[index])
        assert isinstance(video, VideoViews)
        crop, clip = divmod((turn + index) % video.num_views, len(video.frame_index))
        rows: Tensor = video.images[video.frame_index[clip], video.crop_index[crop]]
        return rows


def open_store(
    config: Config, method: Method, model: nn.Module, *, any_views: bool = False
) -> FeatureStore:
    """The store of data.features, checked against the model, whose trunk is frozen for good."""
    facts = facts_of(config, method, model)
    model.get_submodule("visual").requires_grad_(False)
    return FeatureStore(config.data.features, facts, any_views=any_views)
