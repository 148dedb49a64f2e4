"""EVL: what its pieces promise beyond the recorded outputs, and the way from a list to scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kineticlip.__main__ import main
from kineticlip.commands.parity.evl.model import load_model
from kineticlip.config import Config, load_config
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.methods import METHODS
from kineticlip.methods.evl import EVL, METHOD, build, packs
from kineticlip.runtime.errors import UserError
from kineticlip.training.optim import build_optimizer
from moving_clips import moving_clips

GOLDEN = Path(__file__).parents[1] / "golden" / "evl"
RECIPE = Path(__file__).parents[2] / "configs" / "k400-text4vis-vitb16-f8.yaml"
NAMES = ("juggling", "yoga", "zumba")
TINY = (
    "method=evl",
    "model.arch=ViT-tiny-16",
    "model.weights=random",
    "data.num_frames=3",
    "data.resolution=64",
    "evl.layers=2",
)


def settings(*more: str) -> Config:
    return load_config(None, [*TINY, *more])


def lively(model: EVL) -> EVL:
    """Random values where training starts from zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("visual."):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def clips(count: int) -> Tensor:
    return torch.randn(count, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def batch() -> Batch:
    return Batch(pixels=clips(2), labels=torch.tensor([0, 2]), names=("a", "b"))


def test_only_the_decoder_trains_and_nothing_of_the_trunk_is_kept() -> None:
    model = lively(build(settings("evl.mlp_drop_out=0", "evl.class_drop_out=0"), NAMES))
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, metrics = METHOD.loss(model, batch())
    loss.backward()
    assert set(metrics) == {"accuracy"}
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if not n.startswith("visual.")}
    (group,) = METHOD.param_groups(model, settings("optim.lr=4e-4", "optim.weight_decay=0.05"))
    assert len(group["params"]) == len(trained)
    assert (group["lr"], group["weight_decay"]) == (4e-4, 0.05)
    # Two layers: normalised tokens, the block's own for the convolution, maps; small change.
    tokens = 2 * 3 * 17 * 128 * 4
    assert sum(kept) < 2 * 3 * tokens + 4 * sum(p.numel() for p in group["params"])


def test_fine_tuning_the_trunk_has_the_gradients_of_a_finite_difference() -> None:
    """The official code stops in its backward pass here."""
    config = settings("evl.finetune=true", "evl.mlp_drop_out=0", "evl.class_drop_out=0")
    model = lively(build(config, NAMES)).double()
    data = replace(batch(), pixels=clips(2).double())
    parameters = dict(model.named_parameters())
    loss, _ = METHOD.loss(lambda x: model.classify(x.flatten(0, 1), len(x)), data)
    loss.backward()
    assert parameters["visual.proj"].grad is None
    name = "visual.transformer.resblocks.2.attn.in_proj_weight"
    gradient = parameters[name].grad
    assert gradient is not None
    direction = gradient / gradient.norm()
    differences = []
    for sign in (1, -1):
        with torch.no_grad():
            parameters[name].add_(direction, alpha=sign * 1e-3)
            logits = model.decoder(lambda tap: model._run_trunk(data.pixels.flatten(0, 1), tap), 2)
            differences.append(torch.nn.functional.cross_entropy(model.proj(logits), data.labels))
            parameters[name].sub_(direction, alpha=sign * 1e-3)
    slope = float(differences[0] - differences[1]) / 2e-3
    assert slope == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_zero_stage_3_is_refused_in_one_line() -> None:
    config = settings("train.zero_stage=3")
    with pytest.raises(UserError, match=r"train.zero_stage: EVL trains at stages 0 to 2"):
        METHOD.param_groups(build(config, NAMES), config)


def test_the_key_bias_decays_without_a_gradient() -> None:
    model = build(settings(), NAMES)
    bias = model.decoder.get_parameter("decoder_layers.0.attn.k_proj.bias")
    with torch.no_grad():
        bias.fill_(1.0)
    config = settings("optim.lr=0.1", "optim.weight_decay=0.5")
    optimizer = build_optimizer(METHOD.param_groups(model, config), config.optim)
    METHOD.loss(model, batch())[0].backward()
    assert bias.grad is not None and not bias.grad.any()
    optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.full_like(bias, 0.95))


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_shared_images_change_no_score(chunk: int) -> None:
    """Three clips of a short video show the same frames again and again."""
    model = lively(build(settings(), NAMES)).eval()
    generator = torch.Generator().manual_seed(5)
    videos = []
    for number, index in enumerate([[[0, 1, 2], [1, 2, 2]], [[0, 0, 0], [0, 0, 0]]]):
        frames = max(map(max, index)) + 1
        videos.append(
            VideoViews(
                name=str(number),
                label=0,
                images=torch.randint(0, 256, (frames, 2, 3, 64, 64), generator=generator).byte(),
                frame_index=torch.tensor(index),
                crop_index=torch.tensor([0, 1, 0]),
                decoder="made",
                num_frames=frames,
            )
        )
    with torch.inference_mode():
        scores = METHOD.score(model, videos, chunk)
        written_out = [model(video.clips()).softmax(dim=1).mean(dim=0) for video in videos]
    torch.testing.assert_close(scores, torch.stack(written_out), atol=1e-6, rtol=1e-5)


def test_packs_hold_whole_views_and_few_images() -> None:
    numbers = torch.tensor([[0, 1, 2], [1, 2, 3], [4, 5, 6], [9, 9, 9]])
    found = list(packs(numbers, 4))
    assert [distinct.tolist() for distinct, _ in found] == [[0, 1, 2, 3], [4, 5, 6, 9]]
    assert torch.equal(torch.cat([distinct[index] for distinct, index in found]), numbers)


def test_a_trunk_in_bf16_gives_nearly_the_same_logits() -> None:
    model = load_model(GOLDEN / "rect")
    recorded = load_file(GOLDEN / "rect" / "io.safetensors")
    model.visual.to(torch.bfloat16)
    with torch.no_grad():
        logits = model(recorded["clip"].float().transpose(1, 2))
    assert logits.dtype == torch.float32
    error = (logits - recorded["logits"]).abs().max() / recorded["logits"].abs().max()
    assert 1e-6 < error < 0.05


def command(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err


def saved(tmp_path: Path, config: Config) -> Path:
    """A decoder alone, as official files hold it."""
    model = build(config, NAMES)
    path = tmp_path / "decoder.safetensors"
    save_file({n: t for n, t in model.state_dict().items() if not n.startswith("visual.")}, path)
    return path


def test_an_official_file_takes_its_trunk_from_elsewhere(tmp_path: Path) -> None:
    config = settings("evl.backbone=random")
    path = saved(tmp_path, config)
    model = build(replace(config, model=replace(config.model, weights=str(path))), NAMES)
    assert model.untrained == ("visual",)
    expected = load_file(path)
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("pairs", "names", "message"),
    [
        ((), NAMES[:2], "a model of 3 classes, but 2 are to be scored (data.labels)"),
        (("data.num_frames=5",), NAMES, "a model of 3 frames, not 5 (data.num_frames)"),
        (("data.resolution=224",), NAMES, "data.resolution: ViT-tiny-16 takes 64 px, not 224"),
        (("evl.layers=5",), NAMES, "evl.layers: 5 decoder layers, 4 blocks"),
        (("evl.heads=3",), NAMES, "evl.heads: a width of 128"),
        (("model.arch=RN50", "data.resolution=224"), NAMES, "RN50 is a ResNet; EVL needs a ViT"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, pairs: tuple[str, ...], names: tuple[str, ...], message: str
) -> None:
    config = settings("evl.backbone=random", *pairs)
    path = saved(tmp_path, settings())
    with pytest.raises(UserError) as error:
        build(replace(config, model=replace(config.model, weights=str(path))), names)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_resolution_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path, settings())
    tensors = load_file(path)
    tensors["decoder.cross_attention.0.w1"] = torch.zeros(729, 128)
    save_file(tensors, path)
    config = settings("evl.backbone=random", f"model.weights={path}")
    with pytest.raises(UserError, match=r"another resolution: 729 displacements, and 64 px have"):
        build(config, NAMES)


def test_one_switch_turns_a_text4vis_recipe_into_evl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same loops train it, resume it, score it, and score its exported weights."""
    listing = moving_clips(tmp_path, 6)
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    run = tmp_path / "run"
    pairs = [
        *TINY,
        f"data.train_list={listing}",
        f"data.train_root={tmp_path}",
        f"data.val_list={listing}",
        f"data.val_root={tmp_path}",
        f"data.labels={tmp_path / 'labels.txt'}",
        "data.min_frames=0",
        "data.workers=1",
        "optim.warmup_epochs=0",
        "optim.rate_at=start",
        "optim.lr=4e-4",
        "train.steps=4",
        "train.batch_size=2",
        "train.micro_batch_size=1",
        "train.precision=fp32",
        "train.checkpoint_every=2",
        "train.log_every=1",
        "train.eval_every=0",
        "eval.precision=fp32",
        "test.crops=3",
        "test.clips=1",
    ]
    assert METHODS["evl"].pipeline == "evl"

    def words(*more: str) -> list[str]:
        chosen = [*pairs, f"output={run}", *more]
        return [word for pair in chosen for word in ("--set", pair)]

    assert main(["train", "--config", str(RECIPE), *words()]) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [round(row["lr"][0] / 4e-4, 4) for row in steps] == [1.0, 0.8536, 0.5, 0.1464]
    scoring = ["eval", "--config", str(RECIPE), *words(), "--json", "--fresh", "--labels"]
    scoring += [str(tmp_path / "labels.txt"), "--weights", str(run / "weights.safetensors")]
    assert main([*scoring, "--out", str(run / "eval")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["scored"], summary["protocol"]["crops"]) == (6, 3)
    assert summary["protocol"]["method"] == "evl"
    # The finished half of the run, continued, ends in the same weights.
    (run / "finished.json").unlink()
    whole = load_file(run / "weights.safetensors")
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    for file in sorted(newest.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    newest.rmdir()
    assert main(["train", "--config", str(RECIPE), *words()]) == 0
    again = load_file(run / "weights.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_head_trains_from_features_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = moving_clips(tmp_path, 4)
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    run, cache = tmp_path / "run", tmp_path / "features"
    pairs = [*TINY, f"data.train_list={listing}", f"data.labels={tmp_path / 'labels.txt'}"]
    pairs += ["optim.warmup_epochs=0", "train.steps=2", "train.batch_size=2", f"output={run}"]
    pairs += ["train.micro_batch_size=2", "train.precision=fp32", "eval.precision=fp32"]
    words = ["--config", str(RECIPE)]
    words += [word for pair in pairs for word in ("--set", pair)]
    assert main(["features", *words, "--list", str(listing), "--root", str(tmp_path), "--out",
                 str(cache)]) == 0  # fmt: skip
    for number in range(4):
        (tmp_path / f"v{number}.mp4").unlink()  # nothing is decoded from here on
    assert (
        main(["train", *words, "--set", f"data.features={cache}", "--set", "data.val_list="]) == 0
    )
    assert "2 steps" in capsys.readouterr().out
    state = load_file(run / "weights.safetensors")
    assert "visual.conv1.weight" in state and "decoder.cls_token" in state
