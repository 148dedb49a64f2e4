"""What the first bytes of a packet say: may decoding start here, and may the picture be left out?

Only what is proven from the bitstream itself counts; containers mark open groups as key frames too.
Sources: ITU-T H.264 (7.3.1, table 7-1), ITU-T H.265 (7.3.1.2, table 7-1), RFC 6386 section 9.1
(VP8), the VP9 bitstream specification 6.2 and annex B, the AV1 bitstream specification 5.3 to 5.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


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
Reader = Callable[[memoryview], PacketFacts]


def packet_reader(codec: str, extradata: bytes | None) -> Reader | None:
    """The reader of a codec's packets by FFmpeg's codec name, or None where none is known."""
    if codec in NAL_READERS:
        return _nal_reader(codec, extradata or b"")
    return PACKET_READERS.get(codec)


# --- H.264 and HEVC: NAL units ----------------------------------------------------------------


def _nal_reader(codec: str, extradata: bytes) -> Reader:
    """Parameter sets that only repeat the container's (`extradata`) are not reported."""
    describe = NAL_READERS[codec]
    # avcC and hvcC begin with version 1; anything else is start codes (Annex B).
    boxed = len(extradata) > 22 if codec == "hevc" else len(extradata) > 6
    if boxed and extradata[0] == 1:
        size = (extradata[21 if codec == "hevc" else 4] & 3) + 1
        return lambda data: describe(_length_prefixed(data, size), extradata)
    return lambda data: describe(_start_coded(data), extradata)


def _length_prefixed(data: memoryview, size: int) -> Iterator[memoryview]:
    offset, end = 0, len(data)
    while offset + size < end:
        length = int.from_bytes(data[offset : offset + size], "big")
        offset += size
        yield data[offset : offset + length]
        offset += length


def _start_coded(data: memoryview) -> Iterator[memoryview]:
    raw = bytes(data)
    start = raw.find(b"\0\0\1")
    while start >= 0:
        following = raw.find(b"\0\0\1", start + 3)
        yield data[start + 3 : following if following >= 0 else len(raw)]
        start = following


def _h264_facts(units: Iterator[memoryview], known: bytes) -> PacketFacts:
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
    payload = bytes(unit[1:17]).replace(b"\0\0\3", b"\0\0")  # without emulation prevention
    bits = "".join(f"{byte:08b}" for byte in payload)
    values: list[int] = []
    start = 0
    while len(values) < 2:  # first_mb_in_slice, slice_type: Exp-Golomb codes (9.1)
        zeros = bits.find("1", start) - start
        end = start + 2 * zeros + 1
        if zeros < 0 or end > len(bits):
            return -1
        values.append(int(bits[start + zeros : end], 2) - 1)
        start = end
    return values[1] % 5


def _hevc_facts(units: Iterator[memoryview], known: bytes) -> PacketFacts:
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


NAL_READERS = {"h264": _h264_facts, "hevc": _hevc_facts}


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


PACKET_READERS: dict[str, Reader] = {
    "vp8": _vp8_facts,
    "vp9": _vp9_facts,
    "av1": _av1_facts,
    "mjpeg": _jpeg_facts,
}
