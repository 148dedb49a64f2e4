"""Training pixels against the official codes', draw by draw, and the properties of our own part."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from kineticlip.config import DataConfig
from kineticlip.data import augment as module
from kineticlip.data import randaugment
from kineticlip.data.augment import (
    BIKE_SOMETHING,
    PLAIN_RULES,
    TEXT4VIS_SOMETHING,
    Box,
    apply_evl,
    apply_text4vis,
    draw_evl_box,
    draw_multiscale_box,
    plan_text4vis,
    randaugment_clip,
)
from kineticlip.data.pipelines import PIPELINES, training_pixels
from kineticlip.data.sampling import ClipRandom, segment_train, strided_train
from kineticlip.data.statistics import CLIP_STATISTICS
from kineticlip.data.views import apply_pillow, text4vis_geometry

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCES = dict(np.load(GOLDEN / "text4vis" / "crops_src.npz"))
TRAIN = dict(np.load(GOLDEN / "text4vis" / "train_aug.npz"))
EVL = json.loads((GOLDEN / "evl" / "dataset.json").read_text())
EVL_ARRAYS = dict(np.load(GOLDEN / "evl" / "dataset.npz"))
VITA = json.loads((GOLDEN / "vitaclip" / "data.json").read_text())
VITA_ARRAYS = dict(np.load(GOLDEN / "vitaclip" / "data.npz"))
LAST_BIT = (
    0.0 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else 2.4e-7
)  # as in test_views.py


def both(seed: int) -> ClipRandom:
    """The generators as `random.seed(seed)` and `np.random.seed(seed)` leave them."""
    return ClipRandom(random.Random(seed), np.random.RandomState(seed))


def augmented(
    pipeline: str, frames: np.ndarray, label: int, data: DataConfig, rng: ClipRandom
) -> tuple[torch.Tensor, int]:
    """A training clip as the loader makes it, for CLIP's weights."""
    rules = PIPELINES[pipeline]
    return training_pixels(rules, frames, label, data, rng=rng, statistics=CLIP_STATISTICS)


def snake(name: str) -> str:
    name = name.removesuffix("Increasing")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


@pytest.mark.parametrize("key", sorted({key.rsplit("/", 1)[0] for key in TRAIN}))
def test_text4vis_training_clips_are_pixel_exact(key: str) -> None:
    source, side, seed = key.split("/")
    something = source.startswith("something_")
    first = SOURCES[f"src_{source.removeprefix('something_')}"]
    size = int(side.removeprefix("in"))
    plan = plan_text4vis(
        first.shape[1],
        first.shape[0],
        size=size,
        rng=random.Random(int(seed.removeprefix("seed"))),
        rules=TEXT4VIS_SOMETHING if something else PLAIN_RULES,
    )
    images = [Image.fromarray(first), Image.fromarray(255 - first)]
    pixels = apply_text4vis(images, plan, size).numpy()
    grid = np.linspace(0, size - 1, 12).astype(int)
    np.testing.assert_array_equal(pixels[:, :, grid][..., grid], TRAIN[f"{key}/grid_u8"])
    if something:
        label = module.MIRRORED_LABELS[86] if plan.flip else 86
        assert label == TRAIN[f"{key}/label_from86"]
    else:
        mean = np.array(CLIP_STATISTICS.mean, dtype=np.float64)[:, None, None]
        std = np.array(CLIP_STATISTICS.std, dtype=np.float64)[:, None, None]
        sums = ((pixels / 255 - mean) / std).sum((2, 3))
        np.testing.assert_allclose(sums, TRAIN[f"{key}/sum"], rtol=1e-5, atol=0.05)


def test_the_golden_seeds_cover_every_decision() -> None:
    plans = [
        plan_text4vis(340, 256, size=224, rng=random.Random(seed)) for seed in range(1000, 1024)
    ]
    assert {plan.flip for plan in plans} == {plan.gray for plan in plans} == {False, True}


def test_the_fallback_crop_cuts_a_square_of_the_resized_frame() -> None:
    """A frame so long that no box fits within ten tries."""
    rng = random.Random(5)
    plan = plan_text4vis(2000, 24, size=16, rng=rng)
    while plan.box is not None:
        plan = plan_text4vis(2000, 24, size=16, rng=rng)
    assert (plan.width, plan.height) == (1333, 16)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 2000, 3), np.uint8))
    pixels = apply_text4vis([image], plan, 16)
    resized = np.asarray(image.resize((1333, 16), Image.Resampling.BICUBIC))
    expected = resized[:, plan.x : plan.x + 16]
    expected = expected[:, ::-1] if plan.flip else expected
    if plan.gray:
        expected = np.asarray(Image.fromarray(expected).convert("L"))[..., None].repeat(3, 2)
    np.testing.assert_array_equal(pixels[0].numpy(), expected.transpose(2, 0, 1))


def test_multiscale_boxes_are_the_official_set() -> None:
    """240 x 320 at 224: sides 240, 210, 180, 158, at most one scale apart, 13 places."""
    rng = random.Random(0)
    boxes = {draw_multiscale_box(320, 240, 224, rng) for _ in range(4000)}
    assert {box.width for box in boxes} == {240, 210, 180, 158}
    assert len({(box.width, box.height) for box in boxes}) == 10
    square = {(box.x, box.y) for box in boxes if (box.width, box.height) == (180, 180)}
    assert len(square) == 13
    assert all(box.x + box.width <= 320 and box.y + box.height <= 240 for box in boxes)


def evl_clip(case: dict, frames: np.ndarray, steps: list, rng: ClipRandom) -> tuple:
    """The official order of draws: frames, RandAugment, box."""
    sampler = (case["num_frames"], rng.numpy)
    if case["sampling_rate"] == -1:
        indices = segment_train(len(frames), *sampler)
    else:
        indices = strided_train(len(frames), case["num_frames"], case["sampling_rate"], rng.numpy)
    clip = frames[indices]
    state = rng.python.getstate(), rng.numpy.get_state()
    if case["auto_augment"]:
        clip = randaugment_clip(clip, rng)
        again = both(0)
        again.python.setstate(state[0])
        again.numpy.set_state(state[1])
        steps += randaugment.draw_evl(again)
    box = draw_evl_box(frames.shape[2], frames.shape[1], rng)
    return indices, box, apply_evl(clip, box, case["spatial_size"], statistics=CLIP_STATISTICS)


RECIPES = {None, "rand-m7-n4-mstd0.5-inc1"}


@pytest.mark.parametrize(
    "case",
    [case for case in EVL["trains"] if case["auto_augment"] in RECIPES],
    ids=lambda c: c["key"],
)
def test_evl_training_clips(case: dict) -> None:
    steps: list = []
    frames = EVL_ARRAYS[f"frames.{case['video']}"]
    indices, box, pixels = evl_clip(case, frames, steps, both(case["seed"]))
    assert indices.tolist() == case["frame_idx"]
    assert [box.y, box.x, box.height, box.width] == case["crop_ijhw"]
    assert [step is not None for step in steps] == [op["applied"] for op in case["aug_ops"]]
    for step, op in zip(steps, case["aug_ops"], strict=True):
        if step is not None:
            assert step.name == op["op"]
            assert list(step.values) == op["args"]
    # Augmented pixels depend on Pillow's version: the golden set names 13.0.0.
    atol = 0.05 if case["auto_augment"] else LAST_BIT
    np.testing.assert_allclose(
        pixels.transpose(0, 1).numpy(), EVL_ARRAYS[case["key"]], rtol=0, atol=atol
    )


@pytest.mark.parametrize("seed", [1])
def test_vitaclip_clips_without_randaugment_are_exact(seed: int) -> None:
    frames, rng = VITA_ARRAYS["video_u8"], both(seed)
    indices = strided_train(len(frames), 4, 4, rng.numpy)
    box = draw_evl_box(frames.shape[2], frames.shape[1], rng)
    pixels = apply_evl(frames[indices], box, 32, statistics=CLIP_STATISTICS).transpose(0, 1).numpy()
    expected = VITA_ARRAYS[f"train_noaug_seed{seed}"]
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=LAST_BIT)


@pytest.mark.parametrize("seed", [0])
def test_vitaclip_clips_with_randaugment(seed: int) -> None:
    frames, rng = VITA_ARRAYS["video_u8"], both(seed)
    indices = strided_train(len(frames), 4, 4, rng.numpy)
    data = DataConfig(resolution=32, num_frames=4)
    pixels, label = augmented("evl", frames[indices], 3, data, rng)
    assert label == 3
    expected = VITA_ARRAYS[f"train_aug_seed{seed}"]
    np.testing.assert_allclose(pixels.transpose(0, 1).numpy(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("case", VITA["randaug"], ids=lambda case: f"seed{case['seed']}")
def test_vitaclip_randaugment_steps(case: dict) -> None:
    rng = both(case["seed"])
    strided_train(30, 4, 4, rng.numpy)  # the frame draw precedes it in the stream
    steps = randaugment.draw_evl(rng)
    assert [step is not None for step in steps] == [op["applied"] for op in case["ops"]]
    for step, op in zip(steps, case["ops"], strict=True):
        if step is not None:
            assert step.name == snake(op["op"])
            assert list(step.values) == op["level_args"]
            assert randaugment.EVL_STYLE.resample == op["resample"]
            assert list(randaugment.EVL_STYLE.fill) == op["fillcolor"]


def test_vitaclip_random_boxes() -> None:
    for case in VITA["random_resized_crop"]:
        box = draw_evl_box(case["w"], case["h"], both(case["seed"]))
        assert [box.y, box.x, box.height, box.width] == case["ijhw"], case


def test_boxes_cover_small_and_tall_frames() -> None:
    """Fallbacks: wide and tall frames keep an aspect between 3/4 and 4/3, centred."""
    assert draw_evl_box(400, 4, both(0)) == Box(197, 0, 5, 4)
    assert draw_evl_box(4, 400, both(0)) == Box(0, 197, 4, 5)


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(4).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", sorted(randaugment.PIXELS))
def test_every_operation_keeps_size_and_changes_pixels(name: str, picture: Image.Image) -> None:
    numbers = {
        "posterize": (2,),
        "solarize": (100,),
        "rotate": (15.0,),
        "translate_x": (7.0,),
        "translate_y": (7.0,),
        "cutout": (20.0, 10.0, 12.0),
        "solarize_add": (60,),
        "add_then_solarize": (60,),
    }
    unscaled = name in randaugment.UNSCALED
    values = () if unscaled else numbers.get(name, (0.2,))
    if name == "auto_contrast":  # random pixels already span the whole range
        picture = picture.point([64 + value // 2 for value in range(256)] * 3)
    step = randaugment.Step(name, values)
    for style in (randaugment.EVL_STYLE, randaugment.ACTIONCLIP_STYLE):
        changed = randaugment.apply_steps(picture, [step], style)
        assert (changed.size, changed.mode) == (picture.size, "RGB")
        assert np.asarray(changed).tobytes() != np.asarray(picture).tobytes()


def test_operations_do_what_their_names_say(picture: Image.Image) -> None:
    def run(name: str, *values: float) -> np.ndarray:
        steps = [randaugment.Step(name, values)]
        style = randaugment.ACTIONCLIP_STYLE
        return np.asarray(randaugment.apply_steps(picture, steps, style)).astype(int)

    pixels = np.asarray(picture).astype(int)
    np.testing.assert_array_equal(run("translate_x", 10.0)[:, :-10], pixels[:, 10:])
    assert not run("translate_x", 10.0)[:, -10:].any()
    np.testing.assert_array_equal(run("translate_y_rel", 0.25)[:-10], pixels[10:])
    lifted = np.minimum(pixels + 60, 255)
    np.testing.assert_array_equal(run("solarize_add", 60), np.where(pixels < 128, lifted, pixels))
    np.testing.assert_array_equal(
        run("add_then_solarize", 60.5), np.where((pixels + 60) < 128, pixels + 60, 255 - lifted)
    )
    np.testing.assert_array_equal(run("posterize", 1.9), pixels & 128)
    cut = run("cutout", 20.0, 10.0, 12.0)
    assert (cut[4:17, 14:27] == (125, 123, 114)).all()
    outside = np.ones(pixels.shape[:2], dtype=bool)
    outside[4:17, 14:27] = False
    np.testing.assert_array_equal(cut[outside], pixels[outside])


def test_published_recipe_draws_for_every_frame() -> None:
    """One frame four times over: the clip-wise recipe keeps them equal, the published one not."""
    frame = np.random.default_rng(6).integers(0, 256, (1, 64, 80, 3), dtype=np.uint8)
    clip = frame.repeat(4, axis=0)

    def versions(recipe: Literal["released", "published"]) -> set[bytes]:
        data = DataConfig(num_frames=4, resolution=48, augmentation=recipe)
        pixels, _ = augmented("text4vis", clip, 0, data, ClipRandom.seeded(11))
        assert pixels.shape == (4, 3, 48, 48)
        return {image.numpy().tobytes() for image in pixels}

    assert len(versions("released")) == 1
    assert len(versions("published")) == 4


def test_published_steps_follow_the_strength() -> None:
    rng = ClipRandom.seeded(0)
    steps = [step for _ in range(600) for step in randaugment.draw_actionclip(rng, 340, 256)]
    assert {step.name for step in steps} == {row[0] for row in randaugment.ACTIONCLIP_OPERATIONS}
    values = {step.name: {abs(value) for value in step.values} for step in steps}
    assert values["rotate"] == {9.0}  # 9/30 of 30 degrees
    assert values["invert"] == set()
    assert values["translate_x"] == {30.0}
    assert values["color"] == {0.1 + 9 / 30 * (1.9 - 0.1)}
    assert {step.values[0] > 0 for step in steps if step.name == "rotate"} == {True, False}
    assert all(
        1 <= step.values[0] <= 340 and 1 <= step.values[1] <= 256
        for step in steps
        if step.name == "cutout"
    )


def test_no_augmentation_is_the_centre_view() -> None:
    frames = np.random.default_rng(7).integers(0, 256, (3, 90, 120, 3), dtype=np.uint8)
    data = DataConfig(num_frames=3, resolution=64, augmentation="none")
    rng = ClipRandom.seeded(1)
    pixels, label = augmented("text4vis", frames, 5, data, rng)
    shape = text4vis_geometry(120, 90, size=64, crops=1)
    assert torch.equal(pixels, apply_pillow(frames, shape)[:, 0])
    assert (label, pixels.dtype) == (5, torch.uint8)
    tensor, _ = augmented("evl", frames, 5, data, rng)
    assert (tensor.shape, tensor.dtype) == ((3, 3, 64, 64), torch.float32)


def test_mirroring_swaps_labels_only_for_something_something() -> None:
    frames = np.random.default_rng(8).integers(0, 256, (2, 60, 80, 3), dtype=np.uint8)
    seen: dict[bool, set[int]] = {False: set(), True: set()}
    for something in seen:
        for seed in range(12):
            data = DataConfig(num_frames=2, resolution=32, something=something)
            rng = ClipRandom.seeded(seed)
            seen[something].add(augmented("text4vis", frames, 166, data, rng)[1])
    assert seen == {False: {166}, True: {166, 167}}


def test_flip_off_never_mirrors_and_keeps_the_other_draws() -> None:
    for seed in range(20):
        on = plan_text4vis(320, 256, size=224, rng=random.Random(seed))
        off = plan_text4vis(320, 256, size=224, rng=random.Random(seed), flip=False)
        assert not off.flip
        assert (on.box, on.gray) == (off.box, off.gray)


def test_bike_brings_something_something_to_its_own_size() -> None:
    plan = plan_text4vis(500, 400, size=224, rng=random.Random(0), rules=BIKE_SOMETHING)
    assert (plan.width, plan.height) == (320, 256)
    wide = [
        plan_text4vis(500, 400, size=224, rng=random.Random(i), rules=BIKE_SOMETHING)
        for i in range(40)
    ]
    assert not any(plan.gray for plan in wide)
    assert len({(plan.box.width, plan.box.height) for plan in wide if plan.box}) > 13


def test_gray_is_pillows() -> None:
    image = Image.fromarray(np.random.default_rng(9).integers(0, 256, (24, 24, 3), np.uint8))
    plan = module.PillowPlan(24, 24, Box(0, 0, 24, 24), 0, 0, False, True)
    pixels = apply_text4vis([image], plan, 24)[0].numpy()
    expected = np.asarray(ImageOps.grayscale(image))
    for channel in pixels:
        np.testing.assert_array_equal(channel, expected)
