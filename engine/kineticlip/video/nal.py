"""H.264 and HEVC as NAL units: where each one begins and ends, and the bits inside.

Sources: ITU-T H.264 and H.265, 7.3.1 and annex B (units), 9.1 and 9.2 (Exp-Golomb codes); ISO/IEC
14496-15, 5.3.3.1 (avcC) and 8.3.3.1 (hvcC).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

Units = Iterator[memoryview]
AVCC_SIZE, HVCC_SIZE = 7, 23  # the least bytes of either box
HVCC_LENGTH = 21  # of its bytes, the one that tells how long a unit's length field is; in avcC: 4


def packet_units(codec: str, extradata: bytes) -> Callable[[memoryview], Units]:
    """How a stream's packets are split into units, by the codec's FFmpeg name and extradata."""
    if not _is_boxed(codec, extradata):
        return _start_coded
    size = (extradata[HVCC_LENGTH if codec == "hevc" else 4] & 3) + 1
    return lambda data: _length_prefixed(data, size)


def extradata_units(codec: str, extradata: bytes) -> Units:
    """The parameter sets of a stream's extradata: avcC, hvcC or start codes."""
    data = memoryview(extradata)
    if not _is_boxed(codec, extradata):
        return _start_coded(data)
    if codec == "hevc":
        return _hvcc_units(data)
    return _counted(data, 6, data[5] & 31)  # the SPS; what follows are PPS


def _is_boxed(codec: str, extradata: bytes) -> bool:
    """avcC and hvcC begin with version 1; anything else is start codes (Annex B)."""
    least = HVCC_SIZE if codec == "hevc" else AVCC_SIZE
    return len(extradata) >= least and extradata[0] == 1


def _hvcc_units(data: memoryview) -> Units:
    """Arrays of units, one for each type."""
    offset = HVCC_SIZE
    for _ in range(data[HVCC_SIZE - 1]):
        count = int.from_bytes(data[offset + 1 : offset + 3], "big")
        offset += 3
        for unit in _counted(data, offset, count):
            yield unit
            offset += 2 + len(unit)


def _counted(data: memoryview, offset: int, count: int) -> Units:
    """`count` units, each after its length in two bytes."""
    for _ in range(count):
        length = int.from_bytes(data[offset : offset + 2], "big")
        yield data[offset + 2 : offset + 2 + length]
        offset += 2 + length


def _length_prefixed(data: memoryview, size: int) -> Units:
    offset, end = 0, len(data)
    while offset + size < end:
        length = int.from_bytes(data[offset : offset + size], "big")
        offset += size
        yield data[offset : offset + length]
        offset += length


def _start_coded(data: memoryview) -> Units:
    raw = bytes(data)
    start = raw.find(b"\0\0\1")
    while start >= 0:
        following = raw.find(b"\0\0\1", start + 3)
        yield data[start + 3 : following if following >= 0 else len(raw)]
        start = following


class Bits:
    """Reads a unit's payload bit by bit. Raises EOFError where it is cut off."""

    def __init__(self, payload: bytes) -> None:
        content = payload.replace(b"\0\0\3", b"\0\0")  # without emulation prevention
        self._value = int.from_bytes(content, "big")
        self._left = 8 * len(content)

    def unsigned(self, count: int) -> int:
        """`count` bits as a number: u(n)."""
        self.skip(count)
        return (self._value >> self._left) & ((1 << count) - 1)

    def flag(self) -> bool:
        return self.unsigned(1) == 1

    def skip(self, count: int) -> None:
        if count > self._left:
            raise EOFError("a unit ends early")
        self._left -= count

    def code(self) -> int:
        """An Exp-Golomb code: ue(v)."""
        rest = self._value & ((1 << self._left) - 1)
        zeros = self._left - rest.bit_length()
        self.skip(zeros)
        return self.unsigned(zeros + 1) - 1

    def signed_code(self) -> int:
        """A signed Exp-Golomb code: se(v)."""
        value = self.code()
        return (value + 1) // 2 if value % 2 else -(value // 2)
