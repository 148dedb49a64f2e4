"""The packets of a video as a table, and which of them a set of frames needs.

Frame numbers follow the output order of a plain sequential decode. For the containers and codecs
here that order is the order of the presentation times, one picture a packet. Where the packets do
not prove it, building the table raises Unsuitable, and the file is decoded in sequence instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kineticlip.video.bitstream import PacketFacts, packet_parser
from kineticlip.video.container import Unsuitable

# Containers that store a presentation time for every picture from the first to the last. AVI does
# not: what FFmpeg derives there lies for B-frames (40 of the 83 time stamps of an HMDB51 clip go
# backwards). MPEG streams may begin anywhere. Packets that stand alone are safe in all of them.
PRESENTATION_TIMES = ("mov", "matroska", "flv")
STANDALONE = ("mjpeg",)
REORDERING = ("h264", "hevc")


@dataclass(frozen=True, kw_only=True)
class Table:
    """One row a packet, in decoding order; all arrays [P].

    pts: presentation times, all different. number: the frame number of the packet's picture, -1
    where an edit list hides it. group: the closed group it belongs to, counted from 0. droppable:
    whether its picture may be left out when it is not wanted.
    """

    pts: NDArray[np.int64]
    number: NDArray[np.int64]
    group: NDArray[np.int64]
    droppable: NDArray[np.bool_]

    @property
    def num_frames(self) -> int:
        return int((self.number >= 0).sum())


def read_packets(container: Any, stream: Any) -> Iterator[tuple[Any, PacketFacts]]:
    """The stream's packets with their facts.

    Raises Unsuitable, at the call, for a container and codec whose packets never tell the frames.
    """
    codec = stream.codec.canonical_name
    parse = packet_parser(codec, stream.codec_context.extradata)
    if parse is None:
        raise Unsuitable(f"{codec} is always decoded in sequence")
    names = container.format.name.split(",")
    if codec not in STANDALONE and not any(name in names for name in PRESENTATION_TIMES):
        raise Unsuitable(f"{codec} in {names[0]} is always decoded in sequence")
    demuxed = (packet for packet in container.demux(stream) if packet.size)
    return ((packet, parse(memoryview(packet))) for packet in demuxed)


def build_table(stream: Any, packets: Iterable[tuple[Any, PacketFacts]]) -> Table:
    """The table of a stream's packets.

    Raises Unsuitable, with the reason, where its pictures must be counted by decoding them.
    """
    times: list[int | None] = []
    hidden: list[bool] = []
    facts: list[PacketFacts] = []
    for packet, fact in packets:  # the packets themselves are not kept
        times.append(packet.pts)
        hidden.append(packet.is_discard)
        facts.append(fact)
    _check_pictures(facts, hidden)
    pts = _checked_times(times)
    if not _parameters_repeat(facts):
        raise Unsuitable("parameter sets change on the way")
    starts = np.array([fact.starts_group for fact in facts])
    _check_order(stream, pts, starts, facts)
    # Sub-layer non-reference pictures serve higher layers: only the top one's are free.
    layers = np.array([fact.layer for fact in facts])
    return Table(
        pts=pts,
        number=_numbers(pts, np.array(hidden)),
        group=np.cumsum(starts) - 1,
        droppable=(layers >= 0) & (layers == layers.max()),
    )


def select(table: Table, numbers: Sequence[int]) -> NDArray[np.int64]:
    """Rows to decode for the given frame numbers, ascending, in decoding order.

    Whole groups without a wanted frame are left out; in the others, what follows the last wanted
    picture and every droppable picture that is not wanted itself.
    """
    wanted = np.isin(table.number, np.asarray(numbers, dtype=np.int64))
    last = np.full(int(table.group[-1]) + 1, -1)
    rows = np.flatnonzero(wanted)
    np.maximum.at(last, table.group[rows], rows)
    needed = np.arange(len(wanted)) <= last[table.group]
    return np.flatnonzero(needed & (wanted | ~table.droppable))


def _check_pictures(facts: Sequence[PacketFacts], hidden: Sequence[bool]) -> None:
    """Raises Unsuitable unless every packet is a picture, and decoding can start at the first."""
    if not facts or all(hidden):
        raise Unsuitable("no packets")
    if any(fact.pictures != 1 for fact in facts):
        raise Unsuitable("packets without a picture")
    if not facts[0].starts_group:
        raise Unsuitable("the stream does not begin with an instant refresh")


def _checked_times(times: Sequence[int | None]) -> NDArray[np.int64]:
    """The presentation times [P]. Raises Unsuitable unless all are there and differ."""
    known = {time for time in times if time is not None}
    if len(known) < len(times):
        raise Unsuitable("time stamps missing or repeated")
    return np.array(times, dtype=np.int64)


def _check_order(
    stream: Any, pts: NDArray[np.int64], starts: NDArray[np.bool_], facts: Sequence[PacketFacts]
) -> None:
    """Raises Unsuitable where presentation times cannot be the order of output."""
    if not _groups_apart(pts, starts):
        raise Unsuitable("groups of pictures overlap in time")
    in_order = bool((np.diff(pts) > 0).all())
    if stream.codec.canonical_name not in REORDERING:
        if not in_order:
            raise Unsuitable("time stamps go backwards")
        return
    reordered = stream.codec_context.has_b_frames and not all(fact.in_order for fact in facts)
    if reordered and in_order and len(pts) > 2:
        # An AVI copied into MP4 or Matroska looks like this: decoding times posing as presentation.
        raise Unsuitable("pictures are reordered but their time stamps are not")


def _parameters_repeat(facts: Sequence[PacketFacts]) -> bool:
    """Whether every group carries the same parameter sets, so that none is lost with another."""
    found = {fact.parameters for fact in facts if fact.parameters}
    if not found:
        return True
    return len(found) == 1 and all(fact.parameters for fact in facts if fact.starts_group)


def _groups_apart(pts: NDArray[np.int64], starts: NDArray[np.bool_]) -> bool:
    """Whether each group's times all lie after those of the group before it."""
    first = np.flatnonzero(starts)
    lowest = np.minimum.reduceat(pts, first)
    highest = np.maximum.reduceat(pts, first)
    return bool((lowest[1:] > highest[:-1]).all())


def _numbers(pts: NDArray[np.int64], hidden: NDArray[np.bool_]) -> NDArray[np.int64]:
    order = np.argsort(pts)
    shown = ~hidden[order]
    number = np.empty(len(pts), dtype=np.int64)
    number[order] = np.where(shown, np.cumsum(shown) - 1, -1)
    return number
