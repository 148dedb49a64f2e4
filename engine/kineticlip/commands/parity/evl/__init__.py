"""Replays the official EVL code's recorded outputs: models, gradients, optimiser steps, scores.

A model is a subfolder with a config.json; sizes and switches are read from the files. Forward
passes may differ by 1e-5 of a tensor's largest value and gradients by 5e-5. The bias of the keys
is left out: its gradient is zero, and what is recorded of it is rounding noise.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from kineticlip.commands.parity.check import Check, compare, exactly
from kineticlip.commands.parity.evl import data as evl_data
from kineticlip.config import EvlConfig, OptimConfig, TrainConfig
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.evaluation.metrics import topk_accuracy
from kineticlip.formats import convert, read_checkpoint
from kineticlip.methods.evl import EVL, EVL_METHOD
from kineticlip.methods.evl_decoder import decoder_shape
from kineticlip.models.architectures import VisionShape
from kineticlip.models.vision import VisionTransformer
from kineticlip.training.optim import Timetable, build_optimizer, epochs_of, rate_factor

FORWARD = 1e-5
GRADIENT = 5e-5
UPDATED = 5e-5  # parameters after AdamW, which turns rounding of small gradients into moves
NOISE = ".attn.k_proj.bias"

Recorded = Mapping[str, Tensor]
Sizes = Mapping[str, Any]


def checks(folder: Path) -> Iterator[Check]:
    """Every recorded file of a folder, in the order of its README."""
    yield from _checkpoint_keys(json.loads((folder / "checkpoint_keys.json").read_text()))
    models = sorted(path.parent for path in folder.glob("*/config.json"))
    yield exactly("at least one recorded model", bool(models), True)
    for path in models:
        yield from _model(path)
    yield from evl_data.checks(folder)
    yield from _evaluation(folder)
    yield from _learning_rates(json.loads((folder / "lr.json").read_text()))
    yield from _checkpoint(folder)


def _tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; its own reader would not name one that is missing."""
    path.stat()
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


# Models -----------------------------------------------------------------------------------------


def make_model(sizes: Sizes, *, variant: str = "c1p1x1") -> EVL:
    """An untrained model of recorded sizes, without dropout; a variant's temporal terms alone."""
    height, width = sizes["input_size"]
    trunk = VisionShape(
        resolution=width,
        height=height,
        patch=sizes["patch_size"][0],
        width=sizes["width"],
        layers=sizes["layers"],
        heads=sizes["heads"],
        embed=sizes["width"],
        mlp_width=4 * sizes["width"],
    )
    options = EvlConfig(
        layers=sizes["decoder_num_layers"],
        qkv_dim=sizes["decoder_qkv_dim"],
        heads=sizes["decoder_num_heads"],
        mlp_factor=sizes["decoder_mlp_factor"],
        mlp_drop_out=0.0,
        temporal_conv="c1" in variant,
        temporal_position="p1" in variant,
        temporal_attention="x1" in variant,
    )
    shape = decoder_shape(options, trunk, sizes["num_frames"])
    return EVL(VisionTransformer(trunk), shape, classes=sizes["num_classes"], drop_out=0.0)


def load_model(folder: Path, *, variant: str = "c1p1x1") -> EVL:
    """The recorded model of a folder, read by the package's own readers."""
    model = make_model(json.loads((folder / "config.json").read_text()), variant=variant)
    tensors = dict(read_checkpoint(folder / "weights.safetensors").tensors)
    clip = folder / "clip_visual.safetensors"
    if clip.is_file():
        tensors |= read_checkpoint(clip).tensors
    own = model.state_dict()
    unused = {"visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"}
    missing = own.keys() - tensors.keys() - unused
    assert not missing, f"{folder}: no recorded weights for {sorted(missing)}"
    wanted = {name: t for name, t in tensors.items() if name in own and name not in unused}
    model.load_state_dict(wanted, strict=False)
    return model.eval()


def _model(folder: Path) -> Iterator[Check]:
    name, sizes = folder.name, json.loads((folder / "config.json").read_text())
    yield from _construction(name, sizes)
    if (folder / "clip_conversion.json").is_file():
        yield from _conversion(folder)
    recorded = _tensors(folder / "io.safetensors")
    model = load_model(folder)
    clip = recorded["clip"].float().transpose(1, 2)  # [B, T, 3, H, W]
    yield from _forward(name, model, clip, recorded)
    variants = _tensors(folder / "variants.safetensors")
    for tag in sorted({key.split(".")[0] for key in variants}):
        model = load_model(folder, variant=tag)
        yield from _variant(f"{name} {tag}", model, clip, recorded["labels"], variants, tag, sizes)
    if (folder / "train3.json").is_file():
        yield from _three_steps(folder, clip, recorded["labels"])


def _construction(name: str, sizes: Sizes) -> Iterator[Check]:
    """Names, shapes, the optimiser's order, and what the initial values look like."""
    torch.manual_seed(0)
    model = make_model(sizes)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    yield exactly(f"{name}: parameter order", list(own), sizes["param_order"])
    shapes = {n: list(p.shape) for n, p in own.items()}
    recorded = {n: s for n, s in sizes["state_dict_keys"].items() if not n.startswith("backbone.")}
    yield exactly(f"{name}: parameter shapes", shapes, recorded)
    zeros = sorted(n for n, p in own.items() if not p.any())
    yield exactly(f"{name}: initial zeros", zeros, sorted(sizes["init_all_zero"]))
    ones = sorted(n for n, p in own.items() if (p == 1).all())
    yield exactly(f"{name}: initial ones", ones, sorted(sizes["init_all_one"]))
    for key, seen in sizes["init_rest"].items():
        # Two samples of one distribution: 6 standard errors of the standard deviation.
        std, count = float(own[key].detach().std()), own[key].numel()
        tolerance = 6 / (2 * count) ** 0.5
        yield compare(
            f"{name}: initial spread of {key}", std / seen["std"], 1.0, atol=2**0.5 * tolerance
        )


def _forward(name: str, model: EVL, clip: Tensor, recorded: Recorded) -> Iterator[Check]:
    """Trunk, taps, every term of the decoder, queries and logits."""
    clips, shape = len(clip), model.decoder.shape
    first = shape.trunk.layers - shape.layers
    seen: dict[str, Tensor] = {}

    def tap(block: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        seen[f"backbone_out.{block}"] = out
        if block >= first:
            parts = {"q": q, "k": k, "v": v, "out": out}
            for part, tensor in parts.items():
                seen[f"feat.{block - first}.{part}"] = tensor.unflatten(0, (clips, -1))

    with torch.no_grad():
        model.visual(clip.flatten(0, 1), tap=tap)
        state = model.decoder.cls_token.expand(clips, -1)
        for layer in range(shape.layers):
            q, k, out = (seen[f"feat.{layer}.{part}"] for part in ("q", "k", "out"))
            series = out.permute(0, 2, 3, 1).flatten(0, 1)  # [B * N, D, T]
            conv = model.decoder.temporal_conv[layer](series)
            conv = conv.unflatten(0, (clips, -1)).permute(0, 3, 1, 2)  # [B, T, N, D]
            moved = F.pad(model.decoder.motion(layer, q, k), (0, 0, 1, 0))
            position = model.decoder.temporal_pos_embed[layer][:, None]
            state = model.decoder.step(layer, state, q, k, out)
            seen[f"conv.{layer}"] = conv
            seen[f"xattn.{layer}"] = moved
            seen[f"tokens.{layer}"] = (out + conv + position + moved).flatten(1, 2)
            seen[f"query.{layer}"] = state[:, None]
        seen["logits"] = model(clip)
    inputs = ("clip", "labels")
    unused = "feat.0.attn_out"  # what the trunk's attention added, which no decoder reads
    for key in sorted(recorded.keys() - {*inputs, unused}):
        yield compare(f"{name} io: {key}", seen[key], recorded[key], atol=FORWARD, relative=True)


def _variant(
    name: str,
    model: EVL,
    clip: Tensor,
    labels: Tensor,
    recorded: Recorded,
    tag: str,
    sizes: Sizes,
) -> Iterator[Check]:
    """One cross-entropy step with some of the temporal terms, gradients of everything."""
    model.train()
    states: list[Tensor] = []
    handle = model.decoder.register_forward_hook(lambda _, __, out: states.append(out))
    logits = model(clip)
    handle.remove()
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    found = {"decoder_out": states[0][:, None], "logits": logits, "loss": loss[None]}
    for key, value in found.items():
        expected = recorded[f"{tag}.{key}"]
        yield compare(f"{name}: {key}", value, expected, atol=FORWARD, relative=True)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    prefix = f"{tag}.grad."
    for key in sorted(key for key in recorded if key.startswith(prefix)):
        parameter = key.removeprefix(prefix)
        if not parameter.endswith(NOISE):
            yield compare(
                f"{name}: gradient of {parameter}",
                gradients[parameter],
                recorded[key],
                atol=GRADIENT,
                relative=True,
            )
    norms = {n: v for n, v in sizes["grad_norms"][tag].items() if not n.endswith(NOISE)}
    for parameter, norm in norms.items():
        gradient = gradients[parameter]
        assert gradient is not None
        yield compare(
            f"{name}: norm of {parameter}", gradient.norm(), norm, atol=GRADIENT, relative=True
        )


def _three_steps(folder: Path, clip: Tensor, labels: Tensor) -> Iterator[Check]:
    """Optimiser steps with the run's own schedule, whole batches and in two parts."""
    facts = json.loads((folder / "train3.json").read_text())
    after = _tensors(folder / "train3.safetensors")
    optim = OptimConfig(
        lr=facts["lr"],
        weight_decay=facts["weight_decay"],
        betas=tuple(facts["betas"]),
        eps=facts["eps"],
        warmup_epochs=0.0,
        rate_at="start",
    )
    for parts in (1, 2):
        seen = facts[f"batch_split{parts}"]
        name = f"{folder.name} train3 in {parts}"
        model = load_model(folder).train()
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": optim.lr}]
        optimizer = build_optimizer(groups, optim)
        losses, rates = [], []
        for step in range(len(seen["losses"])):
            rates.append(optim.lr * _factor(step, facts["T_max"], parts, optim))
            optimizer.param_groups[0]["lr"] = rates[-1]
            total = 0.0
            for pixels, targets in zip(clip.chunk(parts), labels.chunk(parts), strict=True):
                batch = Batch(pixels=pixels, labels=targets, names=("",) * len(targets))
                loss, _ = EVL_METHOD.loss(model, batch)
                (loss / parts).backward()
                total += float(loss.detach()) / parts
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        yield compare(f"{name}: losses", losses, seen["losses"], atol=FORWARD, relative=True)
        yield compare(f"{name}: rates", rates, seen["lr_used"], atol=1e-12, relative=True)
        for parameter, value in model.named_parameters():
            if f"after3.{parameter}" in after and not parameter.endswith(NOISE):
                expected = after[f"after3.{parameter}"]
                yield compare(f"{name}: {parameter}", value, expected, atol=UPDATED)


def _factor(step: int, steps: int, parts: int, optim: OptimConfig) -> float:
    """The schedule's factor at an optimiser step, as the training loop takes it."""
    train = TrainConfig(steps=steps)
    table = Timetable(
        epoch_length=parts,
        accumulation=parts,
        epochs=epochs_of(train, epoch_length=parts, accumulation=parts),
        at_start=optim.rate_at == "start",
    )
    position = step * parts + parts - 1  # of the micro-batch that ends the step
    assert table.steps == steps and table.is_step(position)
    return rate_factor(table.rate_epoch(position), optim, epochs=table.epochs)


def _conversion(folder: Path) -> Iterator[Check]:
    """OpenAI's names to the official ones, to the bit."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "evl.pth"
        convert(folder / "clip_visual.safetensors", target, to="evl")
        model = torch.load(target, weights_only=True)["model"]
    prefix = "module.backbone."
    found = {
        key.removeprefix(prefix): {
            "shape": list(tensor.shape),
            "sha256_f32_le": hashlib.sha256(
                tensor.float().contiguous().numpy().astype("<f4").tobytes()
            ).hexdigest(),
        }
        for key, tensor in model.items()
        if key.startswith(prefix)
    }
    recorded = json.loads((folder / "clip_conversion.json").read_text())
    yield exactly(f"{folder.name} conversion: names", sorted(found), sorted(recorded))
    for key, facts in recorded.items():
        expected = {"shape": facts["shape"], "sha256_f32_le": facts["sha256_f32_le"]}
        yield exactly(f"{folder.name} conversion: {key}", found.get(key), expected)


# Common files -----------------------------------------------------------------------------------


def _checkpoint_keys(recorded: Mapping[str, Any]) -> Iterator[Check]:
    """Names, shapes and order of the released models' parameters, by their own shapes."""
    for name, facts in recorded.items():
        shapes = {key.removeprefix("module."): s for key, s in facts["state_dict"].items()}
        with torch.device("meta"):
            model = make_model(_sizes(shapes))
        own = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
        order = [key.removeprefix("module.") for key in facts["optimizer_param_order"]]
        yield exactly(f"keys of {name}: names and shapes", own, shapes)
        yield exactly(f"keys of {name}: order", list(own), order)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        yield exactly(f"keys of {name}: parameters", count, facts["trainable_parameters"])


def _sizes(shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """The sizes that parameter shapes tell; what they do not (heads, patch) is made up."""
    layer = "decoder.decoder_layers.0"
    width = shapes["decoder.cls_token"][0]
    offsets = shapes["decoder.cross_attention.0.w1"][0]
    tall = next(n for n in range(round(offsets**0.5), 0, -1) if offsets % n == 0)
    layers = sum(key.endswith(".attn.q_proj.weight") for key in shapes)
    return {
        "input_size": [(tall + 1) // 2, (offsets // tall + 1) // 2],
        "patch_size": [1, 1],
        "width": width,
        "heads": 1,
        "layers": layers,
        "num_frames": shapes["decoder.temporal_pos_embed.0"][0],
        "num_classes": shapes["proj.2.bias"][0],
        "decoder_num_layers": layers,
        "decoder_qkv_dim": shapes[f"{layer}.attn.q_proj.bias"][0],
        "decoder_num_heads": 1,
        "decoder_mlp_factor": shapes[f"{layer}.mlp.fc1.bias"][0] / width,
    }


def _evaluation(folder: Path) -> Iterator[Check]:
    """Views to logits to scores to the line that the official code prints."""
    facts = json.loads((folder / "eval.json").read_text())
    recorded = _tensors(folder / "eval.safetensors")
    model = load_model(folder / facts["model"])
    scores, labels = [], []
    for video in range(facts["num_videos"]):
        logits, expected = recorded[f"logits.{video}"], recorded[f"scores.{video}"]
        mean = logits.softmax(dim=-1).mean(dim=0)
        if f"views.{video}" in recorded:
            views = recorded[f"views.{video}"].float()  # [V, 3, T, H, W], one dimension more or not
            views = views.reshape(-1, *views.shape[-4:]).transpose(1, 2)  # [V, T, 3, H, W]
            with torch.no_grad():
                yield compare(
                    f"eval: logits {video}", model(views), logits, atol=FORWARD, relative=True
                )
                mean = EVL_METHOD.score(model, [_as_video(views)], 1)[0]
        yield compare(f"eval: scores {video}", mean, expected.flatten(), atol=FORWARD)
        scores.append(mean.tolist())
        labels.append(int(recorded[f"label.{video}"]))
    top1, top5 = (topk_accuracy(scores, labels, k=min(k, len(scores[0]))) for k in (1, 5))
    line = f"Accuracy on validation set: top1={top1:.2f}%, top5={top5:.2f}%"
    yield exactly("eval: accuracy", [line], facts["printed"])


def _as_video(views: Tensor) -> VideoViews:
    """Views [V, T, 3, H, W] as the frames of V clips of one video."""
    clips, frames = views.shape[:2]
    return VideoViews(
        name="recorded",
        label=0,
        images=views.flatten(0, 1)[:, None],
        frame_index=torch.arange(clips * frames).view(clips, frames),
        crop_index=torch.zeros(1, dtype=torch.int64),
        decoder="recorded",
        num_frames=clips * frames,
    )


def _learning_rates(facts: Mapping[str, Any]) -> Iterator[Check]:
    optim = OptimConfig(lr=facts["base_lr"], warmup_epochs=0.0, rate_at="start")
    steps = facts["T_max"]
    used = [
        optim.lr * _factor(step, steps, 1, optim) for step in range(len(facts["lr_used_at_step"]))
    ]
    # The official scheduler multiplies from step to step, and rounds at every one.
    yield compare("lr: used", used, facts["lr_used_at_step"], atol=1e-12 * optim.lr * steps)
    final = optim.lr * rate_factor(float(steps), optim, epochs=float(steps))
    yield compare("lr: after the last step", final, facts["lr_final"], atol=1e-12 * optim.lr)


def _checkpoint(folder: Path) -> Iterator[Check]:
    """A whole checkpoint of the official main.py: read, loaded, and written again."""
    facts = json.loads((folder / "checkpoint_mini.json").read_text())
    flat = _tensors(folder / "checkpoint_mini.safetensors")
    official = {k.removeprefix("model."): t for k, t in flat.items() if k.startswith("model.")}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        if key.startswith("optimizer.state."):
            index, name = key.removeprefix("optimizer.state.").split(".")
            state.setdefault(int(index), {})[name] = tensor
    tree = {
        "model": official,
        "optimizer": {"state": state, "param_groups": facts["optimizer_param_groups"]},
        "lr_sched": facts["lr_sched"],
        "loss_scaler": facts["loss_scaler"],
        "next_step": facts["next_step"],
    }
    with tempfile.TemporaryDirectory() as scratch:
        path, again = Path(scratch) / facts["file_name"], Path(scratch) / "again.pth"
        torch.save(tree, path)
        checkpoint = read_checkpoint(path)
        convert(path, again, to="evl")
        written = torch.load(again, weights_only=True)["model"]
    yield exactly("checkpoint: format", checkpoint.format, "evl")
    yield exactly("checkpoint: next step", checkpoint.metadata["next_step"], facts["next_step"])
    sizes = _sizes({n: list(t.shape) for n, t in checkpoint.tensors.items()})
    model = make_model(sizes)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    yield exactly("checkpoint: names", sorted(checkpoint.tensors), sorted(own))
    moments = [list(state[index]["exp_avg"].shape) for index in sorted(state)]
    yield exactly(
        "checkpoint: optimiser state order", moments, [list(p.shape) for p in own.values()]
    )
    yield exactly("checkpoint: names written", sorted(written), sorted(official))
    for key in official:
        yield exactly(f"checkpoint: {key}", written.get(key), official[key])
    schedule = facts["lr_sched"]
    optim = OptimConfig(lr=schedule["base_lrs"][0], warmup_epochs=0.0, rate_at="start")
    rate = optim.lr * _factor(facts["next_step"], schedule["T_max"], 1, optim)
    yield compare(
        "checkpoint: next rate", rate, facts["optimizer_param_groups"][0]["lr"], atol=1e-12
    )
