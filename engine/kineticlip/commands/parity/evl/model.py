"""The recorded EVL models: their construction, forward passes, gradients and names."""

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
from kineticlip.config import EvlConfig
from kineticlip.formats import convert, read_checkpoint
from kineticlip.methods.evl import EVL
from kineticlip.methods.evl_decoder import decoder_shape
from kineticlip.models.architectures import VisionShape
from kineticlip.models.vision import VisionTransformer
from kineticlip.runtime.errors import UserError

FORWARD = 1e-5
GRADIENT = 5e-5
NOISE = ".attn.k_proj.bias"
Recorded = Mapping[str, Tensor]
Sizes = Mapping[str, Any]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; its own reader would not name one that is missing."""
    path.stat()
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def make_model(sizes: Sizes, *, variant: str = "c1p1x1") -> EVL:
    """An untrained model of recorded sizes, without dropout; a variant's temporal terms alone.

    UserError for patches that are not square.
    """
    height, width = sizes["input_size"]
    if len(set(sizes["patch_size"])) > 1:
        rows, columns = sizes["patch_size"]
        raise UserError(f"patches of {rows} x {columns}: the engine's are square")
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


def construction(name: str, sizes: Sizes) -> Iterator[Check]:
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


def forward_checks(name: str, model: EVL, clip: Tensor, recorded: Recorded) -> Iterator[Check]:
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


def variant(
    name: str,
    model: EVL,
    clip: Tensor,
    labels: Tensor,
    recorded: Recorded,
    grad_norms: Mapping[str, float],
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
        expected = recorded[key]
        yield compare(f"{name}: {key}", value, expected, atol=FORWARD, relative=True)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    prefix = "grad."
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
    norms = {n: v for n, v in grad_norms.items() if not n.endswith(NOISE)}
    for parameter, norm in norms.items():
        gradient = gradients[parameter]
        assert gradient is not None
        yield compare(
            f"{name}: norm of {parameter}", gradient.norm(), norm, atol=GRADIENT, relative=True
        )


def conversion(folder: Path) -> Iterator[Check]:
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
