"""How fast an evaluation ran, and what 8 bits cost it: records, and those of several as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from kineticlip.runtime.errors import UserError
from kineticlip.runtime.journal import Json

STAGES = ("decode", "transfer", "compute")  # what the loop waits for


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Rates per second of wall time, and the share of it spent waiting for each stage.

    chunk: images per forward of the trunk, halved `chunk_halvings` times for want of memory.
    tower: how the trunk runs. model_images_per_second: of the model alone, None where it was not
    timed. decoding: where and why there. processes: None of a run by one.
    """

    seconds: float
    videos_per_second: float
    views_per_second: float
    images_per_second: float
    videos: int
    images: int
    chunk: int
    tower: str
    chunk_halvings: int
    model_images_per_second: float | None
    percent_of_model_speed: float | None
    decode_percent: float
    transfer_percent: float
    compute_percent: float
    decoding: str
    processes: int | None = None

    @property
    def waits(self) -> dict[str, float]:
        """Percent of the wall time that the loop waited for each of STAGES."""
        return {stage: getattr(self, f"{stage}_percent") for stage in STAGES}

    def to_json(self) -> Json:
        """As summary.json has it under `speed`."""
        plain = asdict(self)
        if self.processes is None:
            del plain["processes"]
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str) -> Speed:
        """What `to_json` gave. UserError for a key too many or too few; `source` is named in it."""
        known = {field.name for field in fields(cls)}
        wrong = (values.keys() ^ known) - {"processes"}
        if wrong:
            raise UserError(
                f"{source}: '{min(wrong)}' is {'unknown' if min(wrong) in values else 'missing'} "
                "in the speed of a run; it was written by another version"
            )
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What a model in 8 bits says of some videos, against the same model in bf16.

    videos: how many were compared, on one view each. top1_agreement, top5_agreement: percent of
    them with the same first class, and with the same set of five. score_difference: the largest
    between two probabilities.
    """

    videos: int
    top1_agreement: float
    top5_agreement: float
    score_difference: float

    def to_json(self) -> Json:
        """As summary.json has it, under the name of the precision, in `extra`."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Performance:
    """The speed of a run and, of one in 8 bits, its agreement with bf16."""

    speed: Speed
    agreement: Agreement | None = None

    def to_json(self) -> Json:
        agreement = self.agreement.to_json() if self.agreement else None
        return {"speed": self.speed.to_json(), "agreement": agreement}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str) -> Performance:
        agreement = values.get("agreement")
        return cls(
            speed=Speed.from_json(values["speed"], source),
            agreement=Agreement(**agreement) if agreement else None,
        )


def combined(shares: Sequence[Performance]) -> Performance | None:
    """The performance of processes that ran side by side, as one; None of none."""
    if not shares:
        return None
    agreements = [share.agreement for share in shares if share.agreement is not None]
    return Performance(
        speed=combined_speed([share.speed for share in shares]),
        agreement=combined_agreement(agreements) if agreements else None,
    )


def combined_speed(speeds: Sequence[Speed]) -> Speed:
    """One speed over the longest of the times.

    Counts and the speeds of the models add up; shares of waiting are means over the processes. A
    process that did not time its model leaves that of all unknown. chunk, tower and decoding are
    those of the first: all processes run the same configuration on the same kind of device.
    """
    first, seconds = speeds[0], max(speed.seconds for speed in speeds)
    images = sum(speed.images for speed in speeds)
    videos = sum(speed.videos for speed in speeds)
    views = sum(speed.views_per_second * speed.seconds for speed in speeds)
    ceilings = [speed.model_images_per_second for speed in speeds if speed.videos]
    timed = [ceiling for ceiling in ceilings if ceiling is not None]
    ceiling = sum(timed) if timed and len(timed) == len(ceilings) else None
    waits = {stage: sum(speed.waits[stage] for speed in speeds) / len(speeds) for stage in STAGES}
    return Speed(
        seconds=seconds,
        videos_per_second=videos / seconds,
        views_per_second=views / seconds,
        images_per_second=images / seconds,
        videos=videos,
        images=images,
        chunk=first.chunk,
        tower=first.tower,
        chunk_halvings=sum(speed.chunk_halvings for speed in speeds),
        model_images_per_second=ceiling,
        percent_of_model_speed=100 * (images / seconds) / ceiling if ceiling else None,
        decode_percent=waits["decode"],
        transfer_percent=waits["transfer"],
        compute_percent=waits["compute"],
        decoding=first.decoding,
        processes=len(speeds),
    )


def combined_agreement(agreements: Sequence[Agreement]) -> Agreement:
    """One agreement over the videos of all: shares weighted by videos, the largest difference.

    That is what one process would have found on all of these videos together.
    """
    videos = sum(each.videos for each in agreements)

    def share(name: str) -> float:
        if not videos:
            return 100.0  # of nothing, nothing disagrees
        return sum(each.videos * float(getattr(each, name)) for each in agreements) / videos

    return Agreement(
        videos=videos,
        top1_agreement=share("top1_agreement"),
        top5_agreement=share("top5_agreement"),
        score_difference=max(each.score_difference for each in agreements),
    )
