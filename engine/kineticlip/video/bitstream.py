"""What the first bytes of a packet say: may decoding start here, and may the picture be left out?

Only what is proven from the bitstream itself counts; containers mark open groups as key frames too.
Sources: ITU-T H.264 (7.3.1, table 7-1), ITU-T H.265 (7.3.1.2, table 7-1), RFC 6386 section 9.1
(VP8), the VP9 bitstream specification 6.2 and annex B, the AV1 bitstream specification 5.3 to 5.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kineticlip.video.nal import Bits, Units, packet_units


@dataclass(frozen=True, slots=True)
class PacketFacts:
    """One packet's bitstream facts.

    starts_group: a decoder reset here decodes this picture and all that follow in output order,
    and none before it needs a picture from here on. layer: -1 where other pictures may refer to
    this one; else its temporal layer, and pictures of that layer do not refer to it. pictures: how
    many it puts out. parameters: its parameter sets beyond the container's, b"" where it has none.
    in_order: proven to hold no bidirectional slice, so that encoders do not show it out of order.
    """

    starts_group: bool
    layer: int
    pictures: int
    parameters: bytes = b""
    in_order: bool = False


NO_PICTURE = PacketFacts(False, -1, 0)
Parser = Callable[[memoryview], PacketFacts]


def packet_parser(codec: str, extradata: bytes | None) -> Parser | None:
    """The parser of a codec's packets by FFmpeg's codec name, or None where none is known.

    Parameter sets that only repeat the container's (`extradata`) are not reported.
    """
    if codec not in UNIT_PARSERS:
        return PACKET_PARSERS.get(codec)
    known = extradata or b""
    parse, split = UNIT_PARSERS[codec], packet_units(codec, known)
    return lambda data: parse(split(data), known)


# --- H.264 and HEVC: NAL units ----------------------------------------------------------------


def _h264_facts(units: Units, known: bytes) -> PacketFacts:
    """A picture no other refers to has nal_ref_idc 0 in every slice; both fields must agree."""
    instant, reference, slices, in_order = True, False, 0, True
    parameters = b""
    for unit in units:
        if not len(unit):
            continue
        kind = unit[0] & 31
        if 1 <= kind <= 5:
            slices += 1
            in_order &= kind in (1, 5) and _slice_type(unit) in (0, 2, 3, 4)
            instant &= kind == 5
            reference |= unit[0] & 0x60 != 0
        elif kind in (7, 8, 13, 15):
            parameters += _unless_known(unit, known)
    if not slices:
        return NO_PICTURE
    return PacketFacts(instant, -1 if reference else 0, 1, parameters, in_order)


def _slice_type(unit: memoryview) -> int:
    """slice_type modulo 5 of an H.264 slice: 0 P, 1 B, 2 I, 3 SP, 4 SI; -1 for a header cut off."""
    bits = Bits(bytes(unit[1:17]))
    try:
        bits.code()  # first_mb_in_slice
        return bits.code() % 5
    except EOFError:
        return -1


def _hevc_facts(units: Units, known: bytes) -> PacketFacts:
    """Even types below 16 are sub-layer non-reference pictures; types 19 and 20 are IDR."""
    instant, reference, slices, layer = True, False, 0, 0
    parameters = b""
    for unit in units:
        if len(unit) < 2:
            continue
        kind = (unit[0] >> 1) & 63
        if kind < 32:
            slices += 1
            instant &= kind in (19, 20)
            reference |= kind >= 16 or kind % 2 == 1
            layer = (unit[1] & 7) - 1
        elif kind in (32, 33, 34):
            parameters += _unless_known(unit, known)
    if not slices:
        return NO_PICTURE
    return PacketFacts(instant, -1 if reference else layer, 1, parameters)


def _unless_known(unit: memoryview, known: bytes) -> bytes:
    content = bytes(unit).rstrip(b"\0")
    return b"" if content in known else content


UNIT_PARSERS = {"h264": _h264_facts, "hevc": _hevc_facts}


# --- codecs without reordering: a packet is a picture ------------------------------------------


def _vp8_facts(data: memoryview) -> PacketFacts:
    """Frame tag: bit 0 is 0 for key frames, bit 4 is show_frame."""
    if not len(data):
        return NO_PICTURE
    return PacketFacts(data[0] & 1 == 0, -1, (data[0] >> 4) & 1)


def _vp9_facts(data: memoryview) -> PacketFacts:
    """Uncompressed header; a superframe (index at its end) hides all its frames but the last."""
    if not len(data) or data[0] >> 6 != 2:
        return NO_PICTURE
    profile = ((data[0] >> 5) & 1) | ((data[0] >> 3) & 2)
    shift = 2 if profile == 3 else 3  # profile 3 has a reserved bit
    if (data[0] >> shift) & 1:  # show_existing_frame
        return PacketFacts(False, -1, 1)
    superframe = data[-1] & 0xE0 == 0xC0
    key = (data[0] >> (shift - 1)) & 1 == 0
    shown = superframe or (data[0] >> (shift - 2)) & 1 == 1
    return PacketFacts(key, -1, int(shown))


def _av1_facts(data: memoryview) -> PacketFacts:
    """A temporal unit shows one frame; a shown key frame after a sequence header resets it all."""
    sequence = False
    for kind, payload in _av1_units(data):
        if kind == 1:
            sequence = True
            if len(payload) and payload[0] & 0x08:  # reduced_still_picture_header
                return PacketFacts(True, -1, 1)
        elif kind in (3, 6):  # frame header, frame
            # show_existing_frame = 0, frame_type = KEY_FRAME, show_frame = 1
            key = len(payload) > 0 and payload[0] >> 4 == 0b0001
            return PacketFacts(sequence and key, -1, 1)
    return NO_PICTURE


def _av1_units(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    offset = 0
    while offset < len(data):
        header = data[offset]
        offset += 2 if header & 4 else 1
        size, shift = 0, 0
        if not header & 2:
            yield (header >> 3) & 15, data[offset:]
            return
        while offset < len(data):  # leb128
            byte = data[offset]
            size |= (byte & 127) << shift
            offset, shift = offset + 1, shift + 7
            if byte < 128:
                break
        yield (header >> 3) & 15, data[offset : offset + size]
        offset += size


def _jpeg_facts(data: memoryview) -> PacketFacts:
    """Every JPEG stands alone."""
    if bytes(data[:2]) != b"\xff\xd8":
        return NO_PICTURE
    return PacketFacts(True, 0, 1)


PACKET_PARSERS: dict[str, Parser] = {
    "vp8": _vp8_facts,
    "vp9": _vp9_facts,
    "av1": _av1_facts,
    "mjpeg": _jpeg_facts,
}
