"""The batch reader and both stream decoders, on what they can decode without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from video_clips import number_of, read_plainly

import kineticlip.video.batch_reader as module
from kineticlip.runtime.errors import UserError
from kineticlip.video import VideoError, nvdec, open_video, stream_decoders
from kineticlip.video.batch_reader import BatchReader, Decoded, Request
from kineticlip.video.container import Unsuitable
from kineticlip.video.dali import DaliDecoder
from kineticlip.video.nvdec import why_not_on_gpu
from kineticlip.video.probe import probe
from kineticlip.video.stream_decoders import TorchcodecDecoder, make_stream_decoder
from kineticlip.video.trim import Trimmed, trim

Clip = Callable[[str], Path]
HOPPER, ADA = (9, 0), (8, 9)


@pytest.fixture(scope="module")
def dali() -> Iterator[DaliDecoder]:
    """DALI on the CPU: the same graph as on a GPU, for VP8, VP9 and MJPEG."""
    decoder = DaliDecoder(batch=3, num_threads=2, device_id=None)
    yield decoder
    decoder.close()


def numbers_in(frames: torch.Tensor) -> list[int]:
    return [number_of(frame.numpy()) for frame in frames]


@pytest.mark.parametrize("name", ["vp9", "vp8", "mjpeg"])
def test_dali_returns_the_asked_frames(clip: Clip, dali: DaliDecoder, name: str) -> None:
    """Pixels may differ by the chroma filter; which frames come may not. Five streams, two runs."""
    wanted = [[3, 13, 29], [39], list(range(40)), [0], [11, 12]]
    found = dali.decode([trim(clip(name), numbers) for numbers in wanted])
    assert [numbers_in(frames) for frames in found] == wanted
    _, plain = read_plainly(clip(name))
    difference = np.abs(found[2].numpy().astype(int) - np.stack([plain[n] for n in range(40)]))
    assert difference.mean() < 4


def test_dali_names_the_bad_stream_and_keeps_the_others(clip: Clip, dali: DaliDecoder) -> None:
    good = trim(clip("vp9"), [20])
    beyond = dataclasses.replace(good, positions=(30,))
    broken = dataclasses.replace(good, data=b"no video at all")
    found = dali.decode([good, beyond, broken, good])
    assert numbers_in(found[0]) == numbers_in(found[3]) == [20]
    assert isinstance(found[1], Unsuitable) and "out-of-bounds" in str(found[1])
    assert isinstance(found[2], Unsuitable) and "Failed to create video decoder" in str(found[2])


@pytest.mark.needs_torchcodec
def test_torchcodec_keeps_the_same_contract(clip: Clip) -> None:
    decoder = TorchcodecDecoder(num_threads=2, device="cpu")
    good = trim(clip("h264"), [5, 17, 30])
    found = decoder.decode([good, dataclasses.replace(good, data=b"no video"), good])
    decoder.close()
    assert isinstance(found[0], torch.Tensor) and isinstance(found[2], torch.Tensor)
    assert numbers_in(found[0]) == numbers_in(found[2]) == [5, 17, 30]
    assert isinstance(found[1], Unsuitable)


def test_a_cpu_batch_is_read_by_pyav(clip: Clip, tmp_path: Path) -> None:
    gone = tmp_path / "gone.mp4"
    gone.write_bytes(clip("h264").read_bytes())
    videos = [open_video(path) for path in (clip("h264"), gone, clip("mpeg4_bframes"))]
    gone.unlink()
    with BatchReader(device="cpu", num_threads=2) as reader:
        assert (reader.decoder, reader.reason) == ("pyav", "PyAV decodes fastest on cpu")
        found = reader.read([Request(video=video, numbers=(2, 30)) for video in videos])
    assert isinstance(found[1], VideoError) and found[1].path == str(gone)
    for result in (found[0], found[2]):
        assert isinstance(result, Decoded)
        assert numbers_in(result.frames) == [2, 30] and result.decoder == "pyav"


def test_a_decoder_may_not_leave_a_place_empty(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are told apart by their place: one left out would give its frames to another."""

    class Forgetful:
        name = "dali"

        def decode(self, streams: Sequence[Trimmed]) -> list[torch.Tensor | None]:
            return [None, *(torch.zeros(1, 96, 144, 3, dtype=torch.uint8) for _ in streams[1:])]

        def close(self) -> None:
            pass

    monkeypatch.setattr(module, "make_stream_decoder", lambda *_, **__: (Forgetful(), "a test"))
    with BatchReader(device="cpu", num_threads=2) as reader:
        requests = [Request(video=open_video(clip("h264")), numbers=(5,))] * 2
        with pytest.raises(AssertionError, match="dali gave neither frames nor a reason"):
            reader.read(requests)


def test_what_the_decoder_lacks_goes_to_the_cpu(
    clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's routing with DALI on the CPU in its place: VP9 goes through, H.264 comes back."""
    decoder = DaliDecoder(batch=2, num_threads=2, device_id=None)
    monkeypatch.setattr(module, "make_stream_decoder", lambda *_, **__: (decoder, "a test"))
    monkeypatch.setitem(nvdec.SMALLEST, "vp9", (16, 16))  # the clip is below NVDEC's size
    names = ["vp9", "h264", "mpeg2", "h264_10bit", "vp9", "h264_turned", "vp9"]
    with BatchReader(device="cpu", batch=2, num_threads=2) as reader:
        found = reader.read([Request(video=open_video(clip(n)), numbers=(1, 38)) for n in names])
    notes = {}
    for name, result in zip(names, found, strict=True):
        assert isinstance(result, Decoded), name
        upright = result.frames.numpy()
        if name == "h264_turned":
            assert result.frames.shape == (2, 144, 96, 3)
            upright = np.rot90(upright, -1, axes=(1, 2))
        assert [number_of(frame) for frame in upright] == [1, 38]
        assert result.decoder == ("dali" if name == "vp9" else "pyav")
        notes[name] = " ".join(result.notes)
    assert notes["vp9"] == ""
    assert "not dali: DALI: " in notes["h264"] and "Failed to create" in notes["h264"]
    assert "cannot be picked by packets" in notes["mpeg2"]
    assert "yuv420p10le is left to the CPU" in notes["h264_10bit"]


@pytest.mark.needs_torchcodec
def test_frames_of_a_turned_video_are_turned_on_the_device(
    clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = TorchcodecDecoder(num_threads=2, device="cpu")
    monkeypatch.setattr(module, "make_stream_decoder", lambda *_, **__: (decoder, "a test"))
    video = open_video(clip("h264_turned"))
    with BatchReader(device="cpu", num_threads=2) as reader:
        (found,) = reader.read([Request(video=video, numbers=(7, 8))])
    assert isinstance(found, Decoded) and found.decoder == "torchcodec"
    np.testing.assert_array_equal(found.frames.numpy(), video.read([7, 8]))


def test_folders_of_jpegs_are_decoded_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI on the CPU in the GPU's place: Pillow's bytes; a damaged file goes back and is named."""
    decoder = DaliDecoder(batch=2, num_threads=2, device_id=None)
    monkeypatch.setattr(module, "make_stream_decoder", lambda *_, **__: (decoder, "a test"))
    folders = {}
    for name in ("whole", "damaged", "uneven", "png"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        for number in range(70):  # more than one run
            width = 40 if (name, number) == ("uneven", 5) else 50
            pixels = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
            turned = Image.Exif()
            turned[0x0112] = 6
            path = folders[name] / f"img_{number:05d}.{'png' if name == 'png' else 'jpg'}"
            Image.fromarray(pixels).resize((width, 30)).save(path, exif=turned)
    damaged = folders["damaged"] / "img_00005.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    videos = {
        name: open_video(folder, frame_template=f"img_{{:05d}}.{'png' if name == 'png' else 'jpg'}")
        for name, folder in folders.items()
    }
    requests = [Request(video=videos["whole"], numbers=tuple(range(70)))]
    requests += [Request(video=videos[name], numbers=(5,)) for name in ("damaged", "uneven", "png")]
    with BatchReader(device="cpu", num_threads=2) as reader:
        whole, broken, uneven, png = reader.read(requests)
    assert isinstance(whole, Decoded) and (whole.decoder, whole.notes) == ("dali", ())
    np.testing.assert_array_equal(whole.frames.numpy(), videos["whole"].read(range(70)))
    assert isinstance(broken, VideoError) and "img_00005.jpg" in broken.path
    assert isinstance(uneven, VideoError) and "is 40 x 30" in uneven.reason
    assert isinstance(png, Decoded) and png.decoder == "folder"
    assert png.notes == ("not dali: png is left to the CPU",)


def test_which_files_nvdec_takes(clip: Clip) -> None:
    h264 = probe(clip("h264"))
    assert why_not_on_gpu(h264, "dali", HOPPER) == ""
    assert "10le" in why_not_on_gpu(probe(clip("h264_10bit")), "torchcodec", HOPPER)
    assert "mjpeg" in why_not_on_gpu(probe(clip("mjpeg")), "dali", HOPPER)
    assert "below NVDEC's 144 x 144" in why_not_on_gpu(probe(clip("hevc")), "dali", HOPPER)
    av1 = dataclasses.replace(h264, codec="av1", width=640, height=360)
    assert "no AV1" in why_not_on_gpu(av1, "torchcodec", HOPPER)
    assert why_not_on_gpu(av1, "torchcodec", ADA) == ""
    tagged = dataclasses.replace(h264, color_matrix="bt709")
    assert "as if it were bt601" in why_not_on_gpu(tagged, "dali", HOPPER)
    assert why_not_on_gpu(tagged, "torchcodec", HOPPER) == ""
    assert "odd sizes" in why_not_on_gpu(dataclasses.replace(h264, width=145), "dali", HOPPER)


def test_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"batch": 2, "num_threads": 2}
    assert make_stream_decoder("pyav", device="cuda", **options) == (None, "asked for")
    with pytest.raises(UserError, match="decodes on a GPU, not on 'cpu'"):
        make_stream_decoder("dali", device="cpu", **options)
    with pytest.raises(UserError, match="Did you mean 'dali'"):
        make_stream_decoder("dalli", device="cuda", **options)

    def missing(**_: object) -> None:
        raise Unsuitable("DALI cannot be imported: no such module")

    made = object()
    monkeypatch.setattr(stream_decoders, "DaliDecoder", missing)
    monkeypatch.setattr(stream_decoders, "TorchcodecDecoder", lambda **_: made)
    assert make_stream_decoder("auto", device="cuda:0", **options) == (
        made,
        "DALI cannot be imported: no such module",
    )
    with pytest.raises(UserError, match="decoder 'dali': DALI cannot be imported"):
        make_stream_decoder("dali", device="cuda", **options)


def test_runs_keep_one_size_together_and_stay_small(
    clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, odd = open_video(clip("h264")), open_video(clip("h264_odd"))
    requests = [Request(video=video, numbers=(0, 1)) for video in (small, odd) * 3]
    kinds = (("h264", small), ("h264_odd", odd))
    names = {
        trim(clip(name), (0, 1), shown=video.probe.stored_size).data: name for name, video in kinds
    }
    runs: list[list[str]] = []

    class Recorder:
        """Decodes nothing, and notes whose streams a run holds."""

        name = "torchcodec"

        def decode(self, streams: Sequence[Trimmed]) -> list[Any]:
            runs.append([names[stream.data] for stream in streams])
            return [Unsuitable("a test")] * len(streams)

        def close(self) -> None:
            pass

    monkeypatch.setattr(module, "make_stream_decoder", lambda *_, **__: (Recorder(), "a test"))
    with BatchReader(device="cpu", batch=3, num_threads=2) as reader:
        reader.read(requests)
        assert runs == [["h264"] * 3, ["h264_odd"] * 3]
        runs.clear()
        monkeypatch.setattr(module, "RUN_BYTES", 2 * 2 * 144 * 96 * 3)
        reader.read(requests)
    assert [len(run) for run in runs] == [2, 1, 1, 1, 1]
