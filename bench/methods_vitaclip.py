"""Vita-CLIP for bench/methods.py: evaluation by the engine and by the formulas written down.

Straightforward: prompts are concatenated to the tokens, carried through attention and MLP and cut
off again; the text tower reads every class's 77 positions for every video. Both score the same
videos of three views and 400 classes with the same weights.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kineticlip.config import Config, DataConfig, ModelConfig, VitaConfig
from kineticlip.data.batch import VideoViews
from kineticlip.data.labels import read_labels
from kineticlip.methods.prompts_vision import VisionPrompts
from kineticlip.methods.vitaclip import METHOD, VitaCLIP, build
from kineticlip.methods.vitaclip_cost import clip_cost
from kineticlip.models.architectures import Architecture, VisionShape, architecture
from kineticlip.models.cost import totals
from kineticlip.models.vision import VisionTransformer

VIEWS = 3
CHUNK = 16  # images per forward of the engine, as evaluation does on a CPU


def vitaclip(arch: str, frames: int, clips: int, rounds: int) -> dict[str, Any]:
    """Seconds and differences of both forms over `clips` videos, multiply-adds of one view."""
    names = read_labels("kinetics-400")
    config = Config(
        method="vitaclip",
        model=ModelConfig(arch=arch, weights="random"),
        data=DataConfig(num_frames=frames, resolution=_side(architecture(arch))),
    )
    model = build(config, names).eval().requires_grad_(False)
    _widen(model)
    videos = [_video(frames, _side(architecture(arch)), seed) for seed in range(clips)]
    with torch.inference_mode():
        start = time.perf_counter()
        _ = model.classifier
        text = time.perf_counter() - start
        scores: dict[str, Tensor] = {}
        seconds: dict[str, list[float]] = {"straightforward": [], "engine": []}
        cpu: dict[str, list[float]] = {"straightforward": [], "engine": []}
        for _ in range(rounds):
            for face, form in (("straightforward", _plain_scores), ("engine", METHOD.score)):
                start, busy = time.perf_counter(), time.process_time()
                scores[face] = form(model, videos, CHUNK)
                seconds[face].append(time.perf_counter() - start)
                cpu[face].append(time.process_time() - busy)
    return {
        "what": f"Vita-CLIP, {arch}, {frames} frames, {clips} videos of {VIEWS} views, "
        "400 classes, evaluation, fp32",
        "threads": torch.get_num_threads(),
        "text_once_seconds": text,
        "difference": {"scores": _relative(scores["engine"], scores["straightforward"])},
        "seconds": {face: _spread(values) for face, values in seconds.items()},
        "cpu_seconds": {face: _spread(values) for face, values in cpu.items()},
        "multiply_adds": vitaclip_counts(arch, frames),
    }


def vitaclip_counts(arch: str, frames: int) -> dict[str, Any]:
    """Multiply-adds of one clip that torch counts on tensors without memory, and by arithmetic."""
    model = architecture(arch)
    shape = model.vision
    assert isinstance(shape, VisionShape)
    side = _side(model)
    with torch.device("meta"), torch.no_grad():
        visual = VisionTransformer(shape, attention="reference").requires_grad_(False)
        prompts = VisionPrompts(shape, frames=frames, attention="reference").requires_grad_(False)
        pixels = torch.empty(frames, 3, side, side)
        with FlopCounterMode(display=False) as plain:
            plain_clips(visual, prompts, pixels[None])
        with FlopCounterMode(display=False) as lean:
            visual(pixels, sources=prompts, offset=prompts.offset(1, frames), pool=frames)
    parts = clip_cost(VitaConfig(), shape, frames)
    arithmetic = totals(parts)
    shared = sum(part.ours for part in parts if part.once)
    # Weights of the one summary token times its value: for torch that is no product of matrices.
    unseen = (shape.layers - 1) * frames * shape.tokens * shape.width
    return {
        "counted": {
            "straightforward": plain.get_total_flops() // 2,
            "engine": lean.get_total_flops() // 2,
        },
        "expected": {
            "straightforward": arithmetic.official,
            "engine": arithmetic.ours + shared - unseen,
        },
    }


def _side(model: Architecture) -> int:
    resolution = model.vision.resolution
    return resolution if isinstance(resolution, int) else resolution[0]


def _widen(model: VitaCLIP) -> None:
    """Prompts that change the result visibly; their initial values hardly do."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.startswith(("prompts.", "prompt_learner.")):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _video(frames: int, side: int, seed: int) -> VideoViews:
    """Three clips of their own frames."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (VIEWS * frames, 1, 3, side, side), generator=generator)
    return VideoViews(
        name=str(seed),
        label=0,
        images=images.to(torch.uint8),
        frame_index=torch.arange(VIEWS * frames).unflatten(0, (VIEWS, frames)),
        crop_index=torch.zeros(1, dtype=torch.long),
        decoder="none",
        num_frames=VIEWS * frames,
    )


def _plain_scores(model: VitaCLIP, videos: list[VideoViews], chunk: int) -> Tensor:
    scores = []
    for video in videos:
        text = F.normalize(plain_text(model), dim=-1)
        clips = [plain_clips(model.visual, model.prompts, clip[None]) for clip in video.clips()]
        views = F.normalize(torch.cat(clips), dim=-1)
        scores.append((model.logit_scale.exp() * views @ text.T).softmax(dim=-1).mean(dim=0))
    return torch.stack(scores)


def plain_text(model: VitaCLIP) -> Tensor:
    """All 77 positions of all prompts. -> [C, E]."""
    tower: Any = model
    learner = tower.prompt_learner
    embedded = tower.token_embedding(learner.tokens)  # [C, 77, W]
    context = learner.ctx.expand(len(embedded), *learner.ctx.shape[-2:])
    rest = embedded[:, 1 + context.shape[1] :]
    x = torch.cat([embedded[:, :1], context, rest], dim=1) + tower.positional_embedding
    x = tower.ln_final(tower.transformer(x, attn_mask=model.attn_mask))
    features: Tensor = x[torch.arange(len(x)), learner.ends] @ tower.text_projection
    return features


def plain_clips(visual: Any, prompts: Any, clips: Tensor) -> Tensor:
    """Clips [B, T, 3, S, S] through blocks over [class, local, global, patches, summary]."""
    images, heads, frames = clips.flatten(0, 1), visual.shape.heads, prompts.frames
    x = visual.embed(images) + prompts.time_embed.repeat(len(clips), 1)[:, None]
    x = _norm(visual.ln_pre, x)
    for index, block in enumerate(visual.transformer.resblocks):
        own = prompts.blocks[index]
        first = own.cls_proj(x[:, 0]).unflatten(0, (-1, frames))
        mixed = _attention(own.summary_attn_layer, _norm(own.summary_ln, first), heads)
        local = (own.local_prompts + first).repeat_interleave(frames, dim=0)
        summary = (first + mixed).flatten(0, 1)[:, None]
        shared = prompts.global_prompts[index].expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], local, shared, x[:, 1:], summary], dim=1)
        x = x + _attention(block.attn, _norm(block.ln_1, x), heads)
        x = torch.cat([x[:, :1], x[:, 1 + frames : -1]], dim=1)  # local and summary go
        hidden = F.linear(_norm(block.ln_2, x), block.mlp.c_fc.weight, block.mlp.c_fc.bias)
        x = x + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
        x = torch.cat([x[:, :1], x[:, 1 + shared.shape[1] :]], dim=1)  # global ones go
    frames_ = _norm(visual.ln_post, x[:, 0]) @ visual.proj  # [M, E]
    means: Tensor = frames_.unflatten(0, (len(clips), -1)).mean(dim=1)
    return means


def _attention(layer: Any, x: Tensor, heads: int) -> Tensor:
    q, k, v = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    out: Tensor = layer.out_proj((weights @ v).transpose(1, 2).flatten(2))
    return out


def _norm(layer: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias)


def _spread(seconds: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "rounds": len(seconds),
    }


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
