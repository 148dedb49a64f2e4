"""Sizes in the sequence parameter sets (SPS) of H.264 and HEVC: coded, and what is cropped of it.

Sources: ITU-T H.264, 7.3.2.1.1 and 7.4.2.1.1; ITU-T H.265, 7.3.2.2.1, 7.3.3 and 7.4.3.2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from kineticlip.video.nal import Bits, extradata_units, packet_units

# Profiles whose SPS tell the chroma format and may hold scaling lists.
HIGH_PROFILES = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)
# Luma samples for one of chroma (horizontally, vertically), by chroma_format_idc.
SUBSAMPLING = ((1, 1), (2, 2), (2, 1), (1, 1))
# No SPS needs more up to its offsets; what claims to would take long to read bit by bit.
LONGEST = 4096
PROFILE_BITS, LEVEL_BITS = 88, 8  # of profile_tier_level() in HEVC


@dataclass(frozen=True, kw_only=True)
class CodedSize:
    """Luma samples that a decoder reconstructs, and how many of them are not shown on each side."""

    width: int
    height: int
    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    @property
    def is_cropped(self) -> bool:
        return bool(self.left or self.right or self.top or self.bottom)


def coded_sizes(codec: str, extradata: bytes, packet: memoryview) -> set[CodedSize]:
    """What the SPS in the extradata and in one packet say.

    codec: "h264" or "hevc". Raises EOFError for an SPS that is cut off, ValueError for one that
    breaks the standard.
    """
    units = [*extradata_units(codec, extradata), *packet_units(codec, extradata)(packet)]
    if codec == "h264":
        return {_h264(Bits(bytes(unit[1:LONGEST]))) for unit in units if unit and unit[0] & 31 == 7}
    return {
        _hevc(Bits(bytes(unit[2:LONGEST])))
        for unit in units
        if len(unit) > 2 and unit[0] == 33 << 1 and unit[1] >> 3 == 0  # type SPS, base layer
    }


def _h264(bits: Bits) -> CodedSize:
    profile = bits.unsigned(8)
    bits.skip(16)  # constraint flags, level
    bits.code()  # seq_parameter_set_id
    chroma = _h264_sample_format(bits) if profile in HIGH_PROFILES else 1
    bits.code()  # log2_max_frame_num_minus4
    _skip_picture_order(bits)
    bits.code()  # max_num_ref_frames
    bits.skip(1)  # gaps_in_frame_num_value_allowed_flag
    columns, rows = bits.code() + 1, bits.code() + 1
    fields = 1 if bits.flag() else 2  # frame_mbs_only_flag: rows count macroblocks of a field
    if fields == 2:
        bits.skip(1)  # mb_adaptive_frame_field_flag
    bits.skip(1)  # direct_8x8_inference_flag
    horizontal, vertical = SUBSAMPLING[chroma]
    return _cropped(bits, 16 * columns, 16 * rows * fields, horizontal, vertical * fields)


def _h264_sample_format(bits: Bits) -> int:
    """Reads what high profiles add; chroma_format_idc, 0 for three separate planes."""
    chroma = _chroma_format(bits)
    bits.code()  # bit_depth_luma_minus8
    bits.code()  # bit_depth_chroma_minus8
    bits.skip(1)  # qpprime_y_zero_transform_bypass_flag
    if bits.flag():  # seq_scaling_matrix_present_flag
        for number in range(12 if chroma == 3 else 8):
            if bits.flag():
                _skip_scaling_list(bits, 16 if number < 6 else 64)
    return chroma


def _skip_scaling_list(bits: Bits, size: int) -> None:
    """7.3.2.1.1.1: a list ends early where the next scale is 0."""
    scale = 8
    for _ in range(size):
        scale = (scale + bits.signed_code()) % 256
        if not scale:
            break


def _skip_picture_order(bits: Bits) -> None:
    kind = bits.code()  # pic_order_cnt_type
    if kind == 0:
        bits.code()  # log2_max_pic_order_cnt_lsb_minus4
    elif kind == 1:
        bits.skip(1)  # delta_pic_order_always_zero_flag
        bits.code()  # offset_for_non_ref_pic
        bits.code()  # offset_for_top_to_bottom_field
        for _ in range(bits.code()):
            bits.code()  # offset_for_ref_frame


def _hevc(bits: Bits) -> CodedSize:
    bits.skip(4)  # sps_video_parameter_set_id
    layers = bits.unsigned(3)  # sps_max_sub_layers_minus1
    bits.skip(1)  # sps_temporal_id_nesting_flag
    _skip_profile(bits, layers)
    bits.code()  # sps_seq_parameter_set_id
    chroma = _chroma_format(bits)
    width, height = bits.code(), bits.code()
    return _cropped(bits, width, height, *SUBSAMPLING[chroma])


def _skip_profile(bits: Bits, layers: int) -> None:
    bits.skip(PROFILE_BITS + LEVEL_BITS)
    present = [(bits.flag(), bits.flag()) for _ in range(layers)]
    if layers:
        bits.skip(2 * (8 - layers))
    for profile, level in present:
        bits.skip(profile * PROFILE_BITS + level * LEVEL_BITS)


def _chroma_format(bits: Bits) -> int:
    """chroma_format_idc; 0 where its planes are coded apart, as if each were monochrome."""
    chroma = bits.code()
    if chroma >= len(SUBSAMPLING):
        raise ValueError(f"chroma format {chroma}")
    if chroma == 3 and bits.flag():  # separate_colour_plane_flag
        return 0
    return chroma


def _cropped(bits: Bits, width: int, height: int, horizontal: int, vertical: int) -> CodedSize:
    """Reads the four offsets where there are any; they count steps of luma samples."""
    if not bits.flag():  # frame_cropping_flag, conformance_window_flag
        return CodedSize(width=width, height=height)
    left, right, top, bottom = (bits.code() for _ in range(4))
    return CodedSize(
        width=width,
        height=height,
        left=left * horizontal,
        right=right * horizontal,
        top=top * vertical,
        bottom=bottom * vertical,
    )
