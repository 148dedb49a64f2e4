"""Every decoder returns what a plain sequential read returns, to the bit."""

from __future__ import annotations

import gc
import io
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from video_clips import RECIPES, Recipe, number_of, picture, read_plainly, write_clip

from kineticlip.runtime.errors import UserError
from kineticlip.video import VideoError, open_video, torchcodec
from kineticlip.video.probe import probe
from kineticlip.video.trim import Selection, select_packets, trim

Clip = Callable[[str], Path]
IN_SEQUENCE = {"h264_ts", "h264_avi", "mpeg4_bframes", "mpeg2"}
TORCHCODEC = set(RECIPES) - IN_SEQUENCE - {"h264_10bit", "h264_444", "mjpeg"}
OPTIONAL = pytest.param("torchcodec", marks=pytest.mark.needs_torchcodec)


@pytest.mark.parametrize("decoder", ["auto", "pyav", OPTIONAL])
@pytest.mark.parametrize("name", RECIPES)
def test_every_decoder_equals_a_plain_read(clip: Clip, name: str, decoder: str) -> None:
    path = clip(name)
    count, plain = read_plainly(path)
    if not RECIPES[name].rotation:  # the plain read itself is in order
        assert [number_of(plain[number]) for number in range(count)] == list(range(count))
    scattered = [count - 1, 0, 23, 23, 7, 8, 30]
    video = open_video(path, decoder=decoder)
    assert (video.num_frames, video.height, video.width) == (count, *plain[0].shape[:2])
    for numbers in (scattered, [0], [count - 1], [13], list(range(count))):
        frames = video.read(numbers)
        assert frames.dtype == np.uint8 and frames.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(frames, np.stack([plain[n] for n in numbers]))


@pytest.mark.parametrize("name", RECIPES)
def test_the_way_of_reading_is_recorded(clip: Clip, name: str) -> None:
    facts = probe(clip(name))
    assert facts.counted == ("decoding" if name in IN_SEQUENCE else "packets")
    assert bool(facts.why_in_sequence) == (name in IN_SEQUENCE)
    automatic = open_video(clip(name))
    assert automatic.decoder == "pyav"
    assert bool(automatic.notes) == (name in IN_SEQUENCE)


@pytest.mark.needs_torchcodec
@pytest.mark.parametrize("name", RECIPES)
def test_torchcodec_reads_what_it_reads_exactly(clip: Clip, name: str) -> None:
    named = open_video(clip(name), decoder="torchcodec")
    assert named.decoder == ("torchcodec" if name in TORCHCODEC else "pyav")
    assert bool(named.notes) == (name not in TORCHCODEC)


def test_probe_tells_what_the_file_is(clip: Clip) -> None:
    plain, turned = probe(clip("h264")), probe(clip("h264_turned"))
    assert (plain.codec, plain.pixel_format, plain.num_frames) == ("h264", "yuv420p", 40)
    assert (plain.keyframes, plain.frame_rate, plain.variable_rate) == (4, 30.0, False)
    assert plain.duration == pytest.approx(40 / 30, abs=1e-3)
    assert (turned.width, turned.height, turned.rotation) == (96, 144, 90)
    assert probe(clip("h264_vfr")).variable_rate
    assert probe(clip("h264_open")).keyframes == 1  # an open group is no place to start


@pytest.mark.parametrize("decoder", ["auto", OPTIONAL])
def test_frames_that_an_edit_list_hides_are_not_counted(
    clip: Clip, tmp_path: Path, decoder: str
) -> None:
    """The packets from the second group on, the first five frames before time zero."""
    path = tmp_path / "cut.mp4"
    with av.open(str(clip("h264"))) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        tick = sorted(packet.pts for packet in packets)[1]
        for packet in packets[12:]:
            packet.pts, packet.dts = packet.pts - 17 * tick, packet.dts - 17 * tick
            packet.stream = copy
            target.mux_one(packet)
    count, plain = read_plainly(path)
    assert number_of(plain[0]) == 17
    video = open_video(path, decoder=decoder)
    assert video.num_frames == count == 23
    assert [number_of(frame) for frame in video.read([0, 22, 9])] == [17, 39, 26]


@pytest.mark.parametrize("decoder", ["auto", OPTIONAL])
def test_decoding_times_posing_as_presentation_times_are_not_believed(
    clip: Clip, tmp_path: Path, decoder: str
) -> None:
    """H.264 with B-frames copied out of an AVI."""
    path = tmp_path / "copied.mkv"
    with av.open(str(clip("h264_avi"))) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts = packet.dts
                packet.stream = copy
                target.mux_one(packet)
    video = open_video(path, decoder=decoder)
    assert not video.probe.in_time_order
    assert video.decoder == "pyav" and "time stamps" in " ".join(video.notes)
    assert [number_of(frame) for frame in video.read(range(40))] == list(range(40))


def test_an_encoder_that_chose_no_b_frames_reorders_nothing(tmp_path: Path) -> None:
    """Groups of two leave no place for the B-frames that the parameter set allows."""
    path = tmp_path / "pairs.mp4"
    recipe = Recipe(suffix=".mp4", codec="libx264", options={"x264-params": "keyint=2:bframes=3"})
    write_clip(path, recipe)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert container.streams.video[0].codec_context.has_b_frames and frame.key_frame
    video = open_video(path)
    assert (video.notes, video.num_frames, video.probe.keyframes) == ([], 40, 20)
    assert [number_of(frame) for frame in video.read([39, 0, 17])] == [39, 0, 17]


def test_pictures_that_change_size_are_scaled_to_the_first(tmp_path: Path) -> None:
    path = tmp_path / "sizes.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = 144, 96, "yuvj420p"
        for number in range(6):
            size = (144, 96) if number < 3 else (288, 192)
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = *size, "yuvj420p"
            encoder.time_base = Fraction(1, 30)
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            for packet in encoder.encode(frame.reformat(format="yuvj420p")):
                packet.pts = packet.dts = number
                packet.stream = stream
                container.mux_one(packet)
    frames = open_video(path).read(range(6))
    assert frames.shape == (6, 96, 144, 3)
    assert abs(int(frames[5, 90, 140, 2]) - 5 * 7) < 12


def test_threads_share_a_source(clip: Clip) -> None:
    videos = [open_video(clip(name), decoder="auto") for name in ("h264", "mpeg4_bframes", "hevc")]
    jobs = [(video, number) for number in range(0, 40, 5) for video in videos]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: number_of(job[0].read([job[1]])[0]), jobs))
    assert found == [number for _, number in jobs]


def test_wrong_numbers_and_names_are_the_callers_mistakes(clip: Clip) -> None:
    video = open_video(clip("h264"))
    for number in (40, -1):
        with pytest.raises(VideoError, match=rf"no frame {number}; it has 40"):
            video.read([3, number])
    assert video.read([]).shape == (0, 96, 144, 3)
    with pytest.raises(UserError, match=r"torchcodek'\. Did you mean 'torchcodec'"):
        open_video(clip("h264"), decoder="torchcodek")


@pytest.mark.parametrize(
    ("module", "install"),
    [
        (None, r"is not installed: pip install 'kineticlip\[torchcodec\]'"),
        (SimpleNamespace(ffmpeg_major_version=None), "no FFmpeg libraries: install .* ffmpeg"),
    ],
)
def test_a_missing_torchcodec_is_an_error_that_says_what_to_install(
    module: object, install: str, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every file alike: one that torchcodec would leave to PyAV says nothing else."""
    monkeypatch.setitem(sys.modules, "torchcodec", module)  # None: as where it is not installed
    torchcodec.load.cache_clear()
    for name in ("h264", "mpeg2"):
        with pytest.raises(UserError, match=rf"decoder 'torchcodec': .*{install}.*'auto'"):
            open_video(clip(name), decoder="torchcodec")
    assert open_video(clip("h264")).decoder == "pyav"


def test_a_decoder_that_contradicts_the_packets_gives_way(
    clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kineticlip.video.pyav as reader

    video = open_video(clip("h264"))

    def one_short(*args: Any, **options: Any) -> Selection:
        selection = select_packets(*args, **options)
        del selection.packets[4]
        return selection

    monkeypatch.setattr(reader, "select_packets", one_short)
    assert [number_of(frame) for frame in video.read([20, 11])] == [20, 11]
    assert "read in sequence" in video.notes[0]


@pytest.mark.parametrize("name", ["h264", "hevc", "vp9", "mjpeg"])
def test_trimming_keeps_few_packets(clip: Clip, name: str) -> None:
    """One frame of the third group (frames 24 to 35) needs at most its own group."""
    trimmed = trim(clip(name), [29])
    assert trimmed.pictures <= {"h264": 5, "hevc": 6, "vp9": 6, "mjpeg": 1}[name]
    with av.open(io.BytesIO(trimmed.data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == trimmed.pictures
    assert number_of(frames[trimmed.positions[0]]) == 29


def test_trimmed_streams_are_upright_for_no_one(clip: Clip) -> None:
    """The engine turns pictures itself, so no decoder may find the rotation and turn them again."""
    trimmed = trim(clip("h264_turned"), [5])
    with av.open(io.BytesIO(trimmed.data)) as container:
        assert next(container.decode(video=0)).rotation == 0


def test_damaged_pictures_are_those_of_a_plain_read(clip: Clip, tmp_path: Path) -> None:
    """What the decoder puts in the place of damage depends on what it decoded before."""
    path = tmp_path / "damaged.mp4"
    content = bytearray(clip("h264").read_bytes())
    with av.open(str(clip("h264"))) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][24]
        content[packet.pos + 40 : packet.pos + packet.size] = b"\xaa" * (packet.size - 40)
    path.write_bytes(content)
    count, plain = read_plainly(path)
    video = open_video(path)
    assert video.num_frames == count == 40
    np.testing.assert_array_equal(video.read([5, 27]), [plain[5], plain[27]])
    assert video.notes == ["read in sequence: damaged pictures"]


def test_a_codec_that_ffmpeg_does_not_know_is_an_error(clip: Clip, tmp_path: Path) -> None:
    path = tmp_path / "unknown.mp4"
    path.write_bytes(clip("h264").read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(VideoError, match="codec is unknown to FFmpeg"):
        open_video(path)


@pytest.mark.parametrize("name", ["mpeg4_bframes", "h264_turned"])
def test_decoded_pictures_go_when_their_video_goes(clip: Clip, name: str) -> None:
    """None waits for the garbage collector: 2,000 of HMDB51's AVIs would hold 2 GB until then."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            video = open_video(clip(name))
            video.read([0, 20])
        del video
        left = [item for item in gc.get_objects() if issubclass(type(item), av.VideoFrame)]
        assert not left
    finally:
        gc.enable()
