"""Models made ready to score: precision, chunk, compilation, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from kineticlip.config import Config, load_config
from kineticlip.data.batch import VideoViews
from kineticlip.evaluation import comparison, probe
from kineticlip.evaluation import ready as readying
from kineticlip.evaluation.comparison import compare_first
from kineticlip.evaluation.probe import probe_chunk
from kineticlip.evaluation.ready import ReadyModel, ready, ready_for_run
from kineticlip.methods import METHODS
from kineticlip.models.packed import ByteLinear
from kineticlip.models.steady import SteadyTower
from kineticlip.runtime.errors import UserError

CPU = torch.device("cpu")
TINY = ("model.arch=ViT-tiny-16", "model.weights=random", "data.resolution=64")
NAMES = ("archery", "bowling", "cooking")


def configured(*pairs: str) -> Config:
    return load_config(None, [*TINY, *pairs])


def made(config: Config, **options: bool) -> ReadyModel:
    model = METHODS["text4vis"].build(config, NAMES)
    return ready(model, config, device=CPU, **options)


def test_half_precision_is_the_trunk_s_alone() -> None:
    model: Any = made(configured("eval.precision=bf16"), packed=False).model
    assert {parameter.dtype for parameter in model.visual.parameters()} == {torch.bfloat16}
    assert model.classifier.dtype == torch.float32
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("precision", "device", "message"),
    [
        ("fp16", "cpu", "eval.precision=fp16 needs a GPU; on a CPU use bf16 or fp32"),
        ("fp8", "cpu", "eval.precision=fp8 is for GPUs; on a CPU use int8 or bf16"),
        ("int8", "cuda", "eval.precision=int8 is for CPUs; on a GPU use bf16 or fp8"),
    ],
)
def test_a_device_that_cannot_is_told_what_to_use_instead(
    precision: str, device: str, message: str
) -> None:
    config = configured(f"eval.precision={precision}")
    with pytest.raises(UserError, match=message):
        ready(nn.Linear(2, 2), config, device=torch.device(device))


def test_the_record_says_what_was_chosen() -> None:
    found = made(configured("eval.precision=int8"), with_reference=True)
    assert found.notes == ("int8 on cpu", "layers packed by oneDNN") and found.chunk == 16
    assert any(isinstance(layer, ByteLinear) for layer in found.model.modules())
    assert found.reference is not None
    trunk = found.reference.get_submodule("visual")
    assert {p.dtype for p in trunk.parameters()} == {torch.bfloat16}
    assert not any(isinstance(layer, ByteLinear) for layer in found.reference.modules())
    plain = made(configured("eval.precision=bf16", "eval.batch_frames=6"), with_reference=True)
    assert plain.reference is None and plain.chunk == 6
    # Inductor packs by itself, and packed layers take no further weights.
    for options in (("eval.compile=always",), {"packed": False}):
        pairs = options if isinstance(options, tuple) else ()
        named = {} if isinstance(options, tuple) else options
        assert made(configured("eval.precision=bf16", *pairs), **named).notes == ("bf16 on cpu",)


@pytest.mark.parametrize(
    ("pairs", "images", "expected"),
    [
        ((), 10**5, True),
        ((), 100, False),
        (("eval.compile=always",), 1, True),
        (("eval.compile=never",), 10**5, False),
        (("eval.deterministic=true",), 10**5, False),
    ],
)
def test_only_long_int8_runs_compile(
    pairs: tuple[str, ...], images: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readying, "why_no_compiler", lambda: "")
    monkeypatch.setattr(probe, "_PROBES", {})
    monkeypatch.setattr(probe, "_rate", lambda *_: 1.0)
    config = configured("eval.precision=int8", *pairs)
    found = ready_for_run(made(config), config, images=images)  # compiles when run
    assert any("compiled" in note for note in found.notes) == expected


class Timed(nn.Module):
    """A tower that takes a made-up time, and fails from some size on."""

    def __init__(self, seconds: dict[int, float], fails_from: int = 10**9) -> None:
        super().__init__()
        self.now, self.seconds, self.fails_from = 0.0, seconds, fails_from

    def forward(self, images: Tensor) -> Tensor:
        if len(images) >= self.fails_from:
            raise torch.OutOfMemoryError("made up")
        self.now += self.seconds[len(images)]
        return images


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Timed({1: 1.0, 2: 1.2, 4: 1.5, 8: 2.9, 16: 5.8}), 4),  # 8 gains 3 %
        (Timed({1: 1.0, 2: 1.2, 4: 1.5, 8: 2.0}, fails_from=4), 2),
        (Timed({1: 1.0, 2: 2.1}), 1),
    ],
)
def test_the_probe_stops_where_doubling_gains_little(
    model: Timed, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_PROBES", {})
    settings: dict[str, Any] = {"device": CPU, "arch": "made", "precision": "fp32", "resolution": 8}
    found = probe_chunk(model, clock=lambda: model.now, **settings)
    assert found.chunk == expected
    before = model.now
    assert probe_chunk(model, **settings) is found and model.now == before


def test_the_probe_of_a_gpu_tries_less_than_its_first_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []

    def rate(tower: nn.Module, size: int, *_: object) -> float:
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("made up")
        return float(size)

    monkeypatch.setattr(probe, "_PROBES", {})
    monkeypatch.setattr(probe, "_rate", rate)
    settings: dict[str, Any] = {"arch": "made", "precision": "fp32", "resolution": 8}
    found = probe_chunk(nn.Identity(), device=torch.device("cuda"), **settings)
    assert found.chunk == 2 and tried == [64, 1, 2, 4]


def test_a_rate_is_the_median_of_several_calls_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slow call, such as the first after a pause, decides nothing."""
    seconds = iter([9.0, 1.0, 5.0, 1.0, 1.0, 1.0] * 9)
    now = [0.0]

    class Calls(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            now[0] += next(seconds)
            return images

    monkeypatch.setattr(probe, "_PROBES", {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "full", lambda shape, *_, **__: torch.zeros(shape))
    settings: dict[str, Any] = {"arch": "made", "precision": "fp32", "resolution": 8}
    found = probe_chunk(Calls(), device=torch.device("cuda"), clock=lambda: now[0], **settings)
    assert found.rates[64] == 64.0


def test_float32_is_float32_once_a_model_is_ready() -> None:
    """cuDNN's convolutions would run in TF32, which is torch's default."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    made(configured("eval.precision=fp32"))
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_videos_that_wait_on_the_cpu_are_compared_on_the_models_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fp8 with frames read by PyAV: the stream's own videos have not been moved yet."""
    seen: list[str] = []

    def score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
        seen.extend(
            tensor.device.type
            for video in videos
            for tensor in (video.images, video.frame_index, video.crop_index)
        )
        return torch.ones(len(videos), 3) / 3

    video = VideoViews(
        name="v", label=0, images=torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8),
        frame_index=torch.zeros(1, 1, dtype=torch.long),
        crop_index=torch.zeros(1, dtype=torch.long),
        decoder="made", num_frames=1,
    )  # fmt: skip
    device = torch.device("meta")
    model = ReadyModel(model=nn.Identity(), device=device, chunk=1, reference=nn.Identity())
    method = replace(METHODS["text4vis"], score=score)
    monkeypatch.setattr(comparison, "one_view", lambda video: video)  # it looks at the indices
    stream, _ = compare_first(model, method, [video])
    assert set(seen) == {"meta"} and len(seen) == 6
    first = next(stream)
    assert isinstance(first, VideoViews) and first.images.device.type == "cpu"


def test_not_one_image_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_PROBES", {})
    with pytest.raises(torch.OutOfMemoryError):
        probe_chunk(
            Timed({}, fails_from=1), device=CPU, arch="made", precision="fp32", resolution=8
        )


@pytest.mark.parametrize(
    ("pairs", "images", "probed"),
    [
        ((), 10**6, True),
        ((), 100, False),
        (("eval.batch_frames=6",), 10**6, False),
        (("eval.deterministic=true",), 10**6, False),
    ],
)
def test_only_long_runs_with_free_shapes_are_probed(
    pairs: tuple[str, ...], images: int, probed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    monkeypatch.setattr(probe, "_PROBES", {})
    monkeypatch.setattr(probe, "_rate", lambda *_: float(next(ticks) < 3) + 1)
    config = configured("eval.precision=bf16", *pairs)
    before = made(config)
    found = ready_for_run(before, config, images=images)
    assert any("probed" in note for note in found.notes) == probed
    assert (found.chunk == before.chunk) != probed
    assert found.notes[0] == "bf16 on cpu" and found.notes[-1] == "layers packed by oneDNN"


def test_compilation_is_for_towers_of_single_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readying, "why_no_compiler", lambda: "")
    config = configured("eval.compile=always", "text4vis.temporal_module=tokenshift")
    with pytest.raises(
        UserError, match=r"eval.compile=always: only for methods that encode single"
    ):
        ready_for_run(made(config), config, images=10)
    config = configured("eval.compile=always")
    found = ready_for_run(made(config), config, images=10)  # compiles when called
    assert isinstance(found.model.visual, SteadyTower)
    assert found.notes == ("bf16 on cpu", "compiled by Inductor")


def test_one_model_is_ready_for_run_after_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readying, "why_no_compiler", lambda: "")
    config = configured("eval.compile=always")
    found = made(config)
    first = ready_for_run(found, config, images=10)
    tower = first.model.get_submodule("visual.tower")
    again = ready_for_run(found, config, images=10)
    assert again.notes == first.notes and again.model.get_submodule("visual.tower") is tower


def test_compilation_without_a_compiler_says_what_to_install() -> None:
    config = configured("eval.compile=always")
    message = r"eval.compile=always: no C\+\+ compiler: install the package g\+\+; or take"
    with inductor.patch({"cpp.cxx": "no-such-compiler"}), pytest.raises(UserError, match=message):
        ready_for_run(made(config), config, images=10)
