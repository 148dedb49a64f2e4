"""Real files: every decoder equals a plain read; hostile files fail with a reason, or decode."""

from __future__ import annotations

import csv
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from video_clips import read_plainly

from kineticlip.video import VideoError, open_video
from kineticlip.video.torchcodec import release_freed_memory

TORCHCODEC = """
    av1_testsrc.mkv basketball_outdoor.mp4 bbb_skipping_rope_vp8.webm bikes.mp4
    carphone_distorted_qcif.mp4 chaplin.mp4 d_basketball_hevc.mp4 d_cartwheel_tiny_48x36.mp4
    d_pancake_vp9_opus.webm d_pool_rot90_meta.mp4 d_segway_fragmented.mp4 d_segway_vfr.mp4
    d_wave_anamorphic_sar.mp4 d_wave_gray.mp4 k400_arm_wrestling_demo.mp4
    k400_cleaning_pool_test.mp4 k400_flipping_pancake.mkv k400_segway_R6llTwEh07w.mp4
    k400_segway_SOX5yA1l24A.mp4 k400_shooting_basketball.mp4 nasa_13013_multistream.mp4
    phone_rot180_vfr_fire2.mp4 rot_meta_180.mov rot_meta_90.mov
""".split()
BY_PACKETS = ["d_arm_wrestling_10bit.mp4", "d_soccer_mjpeg.avi", "hevc_10bit_testsrc.mp4"]
IN_SEQUENCE = """
    d_arm_wrestling_mpeg2.mpg d_shooting_basketball.flv d_soccer.gif d_wave_xvid_bframes.avi
    hmdb51_cartwheel_PippiMichel.avi hmdb51_wave_RATRACE.avi hmdb51_wave_TrumanShow.avi
    ntu_drink_water_S001C001P001R001A001.avi pigs_in_a_polka.gif
    ucf101_SoccerJuggling_g23_c01.avi ucf101_SoccerJuggling_g24_c01.avi ucf101_apply_eye_makeup.avi
""".split()
# Time stamps that go backwards in output order.
LYING = """
    d_wave_xvid_bframes.avi hmdb51_cartwheel_PippiMichel.avi hmdb51_wave_RATRACE.avi
    hmdb51_wave_TrumanShow.avi ntu_drink_water_S001C001P001R001A001.avi ucf101_apply_eye_makeup.avi
""".split()
# Of its two default streams the larger is read, as by the ffmpeg tool; the index has the first.
TWO_STREAMS = "nasa_13013_multistream.mp4"


def index_of(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "INDEX.tsv").open(encoding="utf-8", newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file, delimiter="\t")}


def test_the_lists_name_every_file(shared: Path) -> None:
    assert sorted(TORCHCODEC + BY_PACKETS + IN_SEQUENCE) == sorted(index_of(shared / "videos"))


@pytest.mark.parametrize("name", TORCHCODEC + BY_PACKETS + IN_SEQUENCE)
def test_real_files_equal_a_plain_read(
    shared: Path, shared_videos: Callable[[str], Path], name: str
) -> None:
    path = shared_videos(name)
    row = index_of(shared / "videos")[name]
    video = open_video(path)
    last = video.num_frames - 1
    numbers = [last, 0, last // 2, 2 * last // 3, 0]
    count, plain = read_plainly(path, keep=numbers)
    assert video.num_frames == count
    if name != TWO_STREAMS:
        assert count == int(row["frames_decoded"])
        size = f"{video.width}x{video.height}"
        if row["rotation"] in ("90", "-90"):
            size = f"{video.height}x{video.width}"
        assert size == row["widthxheight"]
    assert abs(video.probe.rotation) == abs(int(row["rotation"]))
    assert video.probe.in_time_order == (name not in LYING)
    assert bool(video.probe.why_in_sequence) == (name in IN_SEQUENCE)
    expected = np.stack([plain[number] for number in numbers])
    np.testing.assert_array_equal(video.read(numbers), expected)
    assert bool(video.notes) == (name in IN_SEQUENCE)


@pytest.mark.needs_torchcodec
@pytest.mark.parametrize("name", TORCHCODEC + BY_PACKETS + IN_SEQUENCE)
def test_torchcodec_reads_the_same_or_leaves_it(
    shared_videos: Callable[[str], Path], name: str
) -> None:
    path = shared_videos(name)
    named, automatic = open_video(path, decoder="torchcodec"), open_video(path)
    assert named.decoder == ("torchcodec" if name in TORCHCODEC else "pyav")
    last = named.num_frames - 1
    numbers = [last, 0, last // 2, 2 * last // 3, 0]
    np.testing.assert_array_equal(named.read(numbers), automatic.read(numbers))


REASONS = {
    "audio_only.mp4": "no video, only audio",
    "corrupt_mdat.mp4": "decoding stops at its first picture",
    "deep_nested_boxes.mp4": "not a video that FFmpeg can open",
    "header_only_ftyp.mp4": "without its index",
    "html_404.mp4": "web page",
    "huge_stsz_count.mp4": "not a video that FFmpeg can open",
    "missing_mdat.mp4": "no picture in it can be decoded",
    "missing_moov.mp4": "without its index",
    "random_bytes.mp4": "not a video that FFmpeg can open",
    "real_decord_corrupted.mp4": "decoding stops after 28 pictures",
    "ssrf_concat.mp4": "playlist",
    "ssrf_sdp.mp4": "session description",
    "text_renamed.mp4": "not a video that FFmpeg can open",
    "truncated_half_moov_lost.mp4": "without its index",
    "zero_bytes.mp4": "is empty",
}
DECODE = {
    "avi_zero_rate.avi": 48,
    "bomb_24h_1fps.mp4": 86400,
    "huge_declared_dims_65535.mp4": 48,
    "huge_declared_duration.mp4": 48,
    "jpg_renamed.mp4": 1,
    "ok_control.mp4": 48,
    "one_frame.mp4": 1,
    "raw_annexb_no_timestamps.h264": 30,
    "real_moviepy_1x1.mp4": 5,
    "real_moviepy_failing_audio.mp4": 280,
    "wrong_ext_webm_as.mp4": 150,
    "zero_frame_delta.mp4": 27,
}


def memory(field: str) -> int:
    """KiB: VmRSS is what this process holds, VmHWM the most since the last reset."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1])


def reset_peak() -> int:
    """Forgets the peak of the tests before, below which nothing would show; what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_peak_of_memory_is_seen() -> None:
    reset_peak()
    np.ones(320 << 20, np.uint8)  # and freed at once
    before = reset_peak()
    assert memory("VmHWM") - before < 100 << 10
    np.ones(320 << 20, np.uint8)
    assert memory("VmHWM") - before > 300 << 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("name", [*REASONS, *DECODE])
def test_hostile_files(shared: Path, name: str) -> None:
    path = shared / "bad_videos" / name
    release_freed_memory()
    began, before = time.monotonic(), reset_peak()
    if name in REASONS:
        with pytest.raises(VideoError) as caught:
            video = open_video(path)
            video.read([0, video.num_frames // 2, video.num_frames - 1])
        assert REASONS[name] in caught.value.reason
        assert caught.value.path == str(path) and "\n" not in str(caught.value)
    else:
        video = open_video(path)
        assert video.num_frames == DECODE[name]
        frames = video.read([0, video.num_frames - 1])
        assert frames.shape == (2, video.height, video.width, 3)
    assert time.monotonic() - began < 20
    assert memory("VmHWM") - before < 300 << 10


def test_every_hostile_file_is_tried(shared: Path) -> None:
    assert sorted([*REASONS, *DECODE]) == sorted(index_of(shared / "bad_videos"))
