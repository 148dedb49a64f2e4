"""Streams for GPU decoders: nothing cropped, and the same frames inside the window."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.bitstream import BitStreamFilterContext
from numpy.typing import NDArray
from video_clips import RECIPES, X264, Recipe, read_plainly, write_clip

import kineticlip.video.batch_reader as module
from kineticlip.video import open_video, remux
from kineticlip.video.batch_reader import BatchReader, Decoded, Request
from kineticlip.video.container import Unsuitable, choose_stream, open_container
from kineticlip.video.packets import read_packets
from kineticlip.video.probe import probe
from kineticlip.video.sps import CodedSize, coded_sizes
from kineticlip.video.stream_decoders import TorchcodecDecoder
from kineticlip.video.trim import Trimmed, trim

Clip = Callable[[str], Path]
WANTED = (1, 5, 7)
HEVC = RECIPES["hevc"]


def h264(width: int, height: int, **changes: Any) -> Recipe:
    options = {**X264, "g": "6", "bf": "2", **changes.pop("options", {})}
    return Recipe(
        suffix=".mp4", codec="libx264", frames=8, size=(width, height), options=options, **changes
    )


def hevc(width: int, height: int) -> Recipe:
    return Recipe(
        suffix=".mp4", codec="libx265", frames=8, size=(width, height), options=HEVC.options
    )


CROPPED = {  # recipe, and the size that is coded
    "h264 340x256": (h264(340, 256), (352, 256)),
    "h264 480x270": (h264(480, 270), (480, 272)),
    "h264 odd": (h264(150, 102), (160, 112)),
    "h264 turned": (h264(150, 102, rotation=90), (160, 112)),
    "h264 1080p": (h264(1920, 1080), (1920, 1088)),
    "h264 fields": (h264(720, 488, options={"x264-params": "interlaced=1"}), (720, 512)),
    "h264 4:4:4": (h264(151, 103, pixel_format="yuv444p"), (160, 112)),
    "hevc 340x256": (hevc(340, 256), (352, 256)),
    "hevc odd": (hevc(150, 102), (160, 112)),
    "hevc 1080p": (hevc(1920, 1080), (1920, 1088)),
}
WHOLE = {
    "h264 320x240": (h264(320, 240), (320, 240)),
    "hevc 320x240": (hevc(320, 240), (320, 240)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made(name)`: the path of a clip of CROPPED or WHOLE, encoded once."""
    folder = tmp_path_factory.mktemp("sizes")

    def make(name: str) -> Path:
        path = folder / f"{name.replace(':', '')}.mp4"
        if not path.exists():
            write_clip(path, (CROPPED | WHOLE)[name][0])
        return path

    return make


def pictures_in(data: bytes | Path) -> list[Any]:
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data)) as container:
        return list(container.decode(video=0))


def planes(picture: Any, size: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """Its Y, U and V in the window that begins at the top left and has this (width, height)."""
    found = []
    for plane in picture.planes:
        rows = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)
        steps = picture.width // plane.width, picture.height // plane.height
        found.append(rows[: -(-size[1] // steps[1]), : -(-size[0] // steps[0])])
    return found


def container_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the sample entry of an MP4 (ISO/IEC 14496-12, 12.1.3)."""
    place = max(data.rfind(name) for name in (b"avc1", b"hvc1", b"hev1"))
    assert place > 0
    size = data[place + 28 : place + 32]
    return int.from_bytes(size[:2], "big"), int.from_bytes(size[2:], "big")


def sizes_said(data: bytes | Path) -> set[CodedSize]:
    """What the parameter sets of a file say, those of its packets included."""
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data)) as container:
        stream = container.streams.video[0]
        codec, extradata = stream.codec.canonical_name, stream.codec_context.extradata
        packets = [packet for packet in container.demux(stream) if packet.size]
        return set().union(*(coded_sizes(codec, extradata, memoryview(p)) for p in packets))


@pytest.mark.parametrize("name", CROPPED | WHOLE)
def test_the_window_holds_the_bytes_of_a_plain_decode(made: Clip, name: str) -> None:
    recipe, coded = (CROPPED | WHOLE)[name]
    facts, plain = probe(made(name)), pictures_in(made(name))
    assert facts.stored_size == recipe.size
    trimmed = trim(made(name), WANTED, shown=facts.stored_size)
    assert trimmed.window is not None and trimmed.window.coded == coded
    assert container_size(trimmed.data) == coded
    assert sizes_said(trimmed.data) == {CodedSize(width=coded[0], height=coded[1])}
    decoded = pictures_in(trimmed.data)
    assert len(decoded) == trimmed.pictures
    for number, place in zip(WANTED, trimmed.positions, strict=True):
        picture = decoded[place]
        assert (picture.width, picture.height, picture.rotation) == (*coded, 0)
        for found, expected in zip(
            planes(picture, recipe.size), planes(plain[number], recipe.size), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
        (shown,) = trimmed.cut(picture.to_ndarray(format="rgb24")[None])
        np.testing.assert_array_equal(shown, plain[number].to_ndarray(format="rgb24"))


@pytest.mark.parametrize("name", CROPPED)
def test_what_the_parameter_sets_say_is_what_ffmpeg_decodes(made: Clip, name: str) -> None:
    recipe, coded = CROPPED[name]
    (size,) = sizes_said(made(name))
    assert (size.width, size.height) == coded
    assert (size.left, size.top) == (0, 0) and size.is_cropped
    assert (size.width - size.right, size.height - size.bottom) == recipe.size


def test_real_files_say_what_ffmpeg_decodes(
    shared: Path, shared_videos: Callable[[str], Path]
) -> None:
    names = [path.name for path in (shared / "videos").iterdir() if path.suffix != ".tsv"]
    found = {name: probe(shared_videos(name)) for name in names}
    checked = {name: facts for name, facts in found.items() if facts.codec in remux.FILTERS}
    assert len(checked) > 20
    for name, facts in checked.items():
        with open_container(facts.path) as container:
            stream = choose_stream(container, facts.path)
            context = stream.codec_context
            extradata = context.extradata or b""
            packets = iter([packet for packet in container.demux(stream) if packet.size])
            first = next(packets)
            (size,) = coded_sizes(facts.codec, extradata, memoryview(first))
            pictures = context.decode(first)
            while not pictures:
                pictures = context.decode(next(packets))
        assert (size.width, size.height) == (context.coded_width, context.coded_height), name
        shown = size.width - size.left - size.right, size.height - size.top - size.bottom
        assert shown == facts.stored_size, name


class PyavStreams:
    """A stream decoder as the batch reader takes it: PyAV in the place of a GPU's."""

    name = "torchcodec"

    def __init__(self) -> None:
        self.taken: list[Trimmed] = []

    def decode(self, streams: Sequence[Trimmed]) -> list[torch.Tensor | Unsuitable]:
        self.taken += streams
        return [self._decode(stream) for stream in streams]

    def _decode(self, stream: Trimmed) -> torch.Tensor:
        pictures = pictures_in(stream.data)
        wanted = [pictures[place].to_ndarray(format="rgb24") for place in stream.positions]
        frames: torch.Tensor = stream.cut(torch.from_numpy(np.stack(wanted)))
        return frames

    def close(self) -> None:
        pass


@pytest.fixture
def in_place_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> PyavStreams:
    streams = PyavStreams()
    monkeypatch.setattr(module, "make_stream_decoder", lambda *_, **__: (streams, "a test"))
    return streams


def read(path: Path, numbers: tuple[int, ...] = WANTED) -> Decoded:
    with BatchReader(device="cpu", num_threads=1) as reader:
        (found,) = reader.read([Request(video=open_video(path), numbers=numbers)])
    assert isinstance(found, Decoded)
    return found


@pytest.mark.parametrize("name", ["h264 340x256", "h264 turned", "hevc 340x256"])
def test_batches_hold_the_frames_of_a_plain_read(
    made: Clip, in_place_of_the_gpu: PyavStreams, name: str
) -> None:
    found = read(made(name))
    assert (found.decoder, found.notes) == ("torchcodec", ())
    windows = [stream.window for stream in in_place_of_the_gpu.taken]
    assert [window and window.coded for window in windows] == [CROPPED[name][1]]
    _, plain = read_plainly(made(name))
    assert found.frames.is_contiguous()
    np.testing.assert_array_equal(found.frames.numpy(), np.stack([plain[n] for n in WANTED]))


def test_real_files_come_through_uncropped_streams_unchanged(
    shared: Path, shared_videos: Callable[[str], Path], in_place_of_the_gpu: PyavStreams
) -> None:
    names = sorted(path.name for path in (shared / "videos").iterdir() if path.suffix != ".tsv")
    videos = [open_video(shared_videos(name)) for name in names]
    ends = [(0, video.num_frames // 2, video.num_frames - 1) for video in videos]
    requests = [
        Request(video=video, numbers=tuple(sorted(set(numbers))))
        for video, numbers in zip(videos, ends, strict=True)
    ]
    with BatchReader(device="cpu", num_threads=1) as reader:
        results = reader.read(requests)
    taken = 0
    for request, found in zip(requests, results, strict=True):
        assert isinstance(found, Decoded), request.video.path
        expected = request.video.read(request.numbers)
        np.testing.assert_array_equal(found.frames.numpy(), expected, request.video.path)
        taken += found.decoder == in_place_of_the_gpu.name
    assert taken == len(in_place_of_the_gpu.taken) > 15


def through(source: Path, target: Path, filters: str, size: tuple[int, int]) -> Path:
    """A copy through one of FFmpeg's bit-stream filters, with another size in the container."""
    with av.open(str(source)) as container, av.open(str(target), "w") as output:
        stream = container.streams.video[0]
        copy = output.add_stream_from_template(stream, opaque=True)
        rewrite = BitStreamFilterContext(filters, in_stream=stream, out_stream=copy)
        copy.codec_context.width, copy.codec_context.height = size
        packets = [packet for packet in container.demux(stream) if packet.size]
        for rewritten in [out for packet in packets for out in rewrite.filter(packet)]:
            rewritten.stream = copy
            output.mux_one(rewritten)
    return target


@pytest.mark.parametrize(
    ("source", "edges", "size"),
    [
        # FFmpeg shows the eight columns all the same: it rounds down to an aligned address.
        ("h264 320x240", "crop_left=8:crop_right=0:crop_top=0:crop_bottom=0", (320, 240)),
        ("hevc 320x240", "crop_left=0:crop_right=0:crop_top=6:crop_bottom=0", (320, 234)),
    ],
)
def test_streams_cropped_at_the_left_or_top_go_to_the_cpu(
    made: Clip,
    in_place_of_the_gpu: PyavStreams,
    tmp_path: Path,
    source: str,
    edges: str,
    size: tuple[int, int],
) -> None:
    codec = source.split()[0]
    path = through(made(source), tmp_path / "cut.mp4", f"{codec}_metadata={edges}", size)
    assert probe(path).stored_size == size
    found = read(path)
    assert (found.decoder, in_place_of_the_gpu.taken) == ("pyav", [])
    assert "cropped at the left or top" in found.notes[0]
    _, plain = read_plainly(path)
    np.testing.assert_array_equal(found.frames.numpy(), np.stack([plain[n] for n in WANTED]))


def test_a_size_that_only_the_container_says_is_kept(
    made: Clip, in_place_of_the_gpu: PyavStreams, tmp_path: Path
) -> None:
    """FFmpeg crops a picture of 320 x 240 to the 312 x 234 of its container."""
    path = through(made("h264 320x240"), tmp_path / "smaller.mp4", "null", (312, 234))
    assert probe(path).stored_size == (312, 234)
    found = read(path)
    assert found.decoder == "torchcodec"
    assert container_size(in_place_of_the_gpu.taken[0].data) == (320, 240)
    _, plain = read_plainly(path)
    np.testing.assert_array_equal(found.frames.numpy(), np.stack([plain[n] for n in WANTED]))


@pytest.mark.parametrize("name", ["vp9", "vp8"])
def test_codecs_without_cropping_are_written_as_they_are(clip: Clip, name: str) -> None:
    size = probe(clip(name)).stored_size
    plain, uncropped = trim(clip(name), WANTED), trim(clip(name), WANTED, shown=size)
    assert plain.window is None
    assert uncropped.window is not None and uncropped.window.coded == size
    assert uncropped.positions == plain.positions
    for one, other in zip(pictures_in(uncropped.data), pictures_in(plain.data), strict=True):
        assert (one.width, one.height) == size
        np.testing.assert_array_equal(one.to_ndarray(), other.to_ndarray())


@pytest.mark.needs_torchcodec
def test_torchcodec_returns_the_window(made: Clip) -> None:
    decoder = TorchcodecDecoder(num_threads=1, device="cpu")
    names = ("h264 340x256", "hevc odd")
    streams = [trim(made(n), WANTED, shown=probe(made(n)).stored_size) for n in names]
    for name, found in zip(names, decoder.decode(streams), strict=True):
        _, plain = read_plainly(made(name))
        np.testing.assert_array_equal(np.asarray(found), np.stack([plain[n] for n in WANTED]))
    decoder.close()


def test_frames_of_another_size_are_refused(made: Clip) -> None:
    trimmed = trim(made("h264 340x256"), WANTED, shown=(340, 256))
    with pytest.raises(Unsuitable, match="decoded as 340 x 256, and are coded as 352 x 256"):
        trimmed.cut(np.zeros((3, 256, 340, 3), dtype=np.uint8))
    with pytest.raises(Unsuitable, match="shown as 360 x 256, more than the 352 x 256"):
        trim(made("h264 340x256"), WANTED, shown=(360, 256))


def test_parameter_sets_that_differ_or_end_early_are_refused(
    made: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    with av.open(str(made("h264 340x256"))) as container:
        stream = container.streams.video[0]
        extradata = stream.codec_context.extradata
        packet, _ = next(read_packets(container, stream))
        with av.open(str(made("h264 480x270"))) as other:
            boxes = other.streams.video[0].codec_context.extradata
        length = int.from_bytes(boxes[6:8], "big")
        unit = boxes[8 : 8 + length]
        within = len(unit).to_bytes(4, "big") + unit + bytes(packet)
        widths = {size.width for size in coded_sizes("h264", extradata, memoryview(within))}
        assert widths == {352, 480}
        cut = len(unit[:6]).to_bytes(4, "big") + unit[:6] + bytes(packet)
        with pytest.raises(EOFError):
            coded_sizes("h264", extradata, memoryview(cut))
    monkeypatch.setattr(remux, "coded_sizes", lambda *_: set())
    with pytest.raises(Unsuitable, match="tell 0 coded sizes, not one"):
        trim(made("h264 340x256"), WANTED, shown=(340, 256))
