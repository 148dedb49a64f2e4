"""What the CLIP-based methods share: building the visual tower, and encoding each image once.

Shape letters: U distinct frames and V distinct crops of one video, K clips, T frames, E embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.data.batch import VideoViews
from kineticlip.data.statistics import PixelStatistics
from kineticlip.formats import load_into
from kineticlip.models.architectures import Architecture, ResNetShape, VisionShape
from kineticlip.models.resnet import ModifiedResNet
from kineticlip.models.vision import NO_DROPOUTS, Dropouts, VisionTransformer
from kineticlip.models.weights import Weights
from kineticlip.runtime.errors import UserError

log = logging.getLogger(__name__)

ADDED = (r"time_embedding", r"transformer\.resblocks\.\d+\.control_point\.conv\.weight")


def vit_of(model: Architecture, method: str) -> VisionShape:
    """The shape of a ViT. UserError, in the name of the method, for a ResNet."""
    if isinstance(model.vision, ResNetShape):
        raise UserError(f"model.arch: {model.name} is a ResNet; {method} needs a ViT")
    return model.vision


def build_visual(
    config: Config,
    weights: Weights,
    *,
    control_point: Callable[[int], nn.Module] | None = None,
    joint_frames: int = 0,
    shift_frames: int = 0,
    dropouts: Dropouts = NO_DROPOUTS,
    optional: tuple[str, ...] = (),
) -> nn.Module:
    """The visual tower of config.model with these weights, or random ones from config.seed.

    control_point, joint_frames and dropouts are those of VisionTransformer, shift_frames that of
    ModifiedResNet. Parameters that these options add, and those that match `optional`, may be
    missing from the weights and then keep their initial values. Raises UserError where the
    weights, the resolution or an option do not suit the architecture.
    """
    shape = weights.model.vision
    if shape.resolution != config.data.resolution:
        raise UserError(
            f"data.resolution: {weights.model.name} takes {shape.resolution} px, "
            f"not {config.data.resolution}"
        )
    make: Callable[[], nn.Module]
    if isinstance(shape, ResNetShape):
        if control_point or joint_frames or dropouts != NO_DROPOUTS:
            raise UserError(f"model.arch: {weights.model.name} is a ResNet: no such option for it")
        if config.train.activation_checkpointing:
            raise UserError("train.activation_checkpointing: only for transformers, not a ResNet")
        make = partial(ModifiedResNet, shape, shift_frames=shift_frames)
    else:
        make = partial(
            VisionTransformer,
            shape,
            kernels=config.model.kernels,
            attention=config.model.attention,
            control_point=control_point,
            joint_frames=joint_frames,
            dropouts=dropouts,
        )
    if control_point or joint_frames:
        optional = (*optional, *ADDED)
    visual = _with_weights(make, weights, config.seed, optional=optional)
    if isinstance(visual, VisionTransformer):
        visual.transformer.checkpointing = config.train.activation_checkpointing
    return visual


def _with_weights(
    make: Callable[[], nn.Module], weights: Weights, seed: int, *, optional: tuple[str, ...]
) -> nn.Module:
    """optional: patterns of parameters that the weights may lack."""
    if weights.path is None:
        with seeded(seed):
            return make()
    weights.check_fits()
    if optional or isinstance(weights.model.vision, ResNetShape):
        with seeded(seed):
            visual = make()
    else:
        # All will be overwritten: drawing initial values for ViT-L takes 3 s of one core.
        with torch.device("meta"):
            visual = make()
        visual.to_empty(device="cpu")
    prefix = "visual."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.tensors.items()
        if name.startswith(prefix)
    }
    kept = load_into(visual, tensors, what=weights.source, optional=optional, ignored=()).kept
    if kept:
        log.info("%s: %d tensors start untrained: %s, ...", weights.source, len(kept), kept[0])
    return visual


def statistics_of(model: nn.Module) -> PixelStatistics:
    """What the weights of a model's visual tower want float32 pixels to be normalised with."""
    tower = model.get_submodule("visual")
    assert isinstance(tower, VisionTransformer | ModifiedResNet), "before it is compiled"
    return tower.shape.statistics


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of the CPU from a seed inside, as they were afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class FrozenTensors(nn.Module):
    """Tensors that move with the model, keep their dtype, and are in no state dict.

    A classifier stays float32 when the model around it is cast to half precision.
    """

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for name, tensor in self.named_buffers():
            setattr(self, name, tensor.to(fn(tensor).device))
        return self


def apply_header(header: nn.Module | None, frames: Tensor) -> Tensor:
    """Frame embeddings [B, T, E] through the temporal header, if any; one frame passes it by."""
    if header is None or frames.shape[1] == 1:
        return frames
    dtype = next(header.parameters()).dtype
    out: Tensor = header(frames.to(dtype))
    return out


def encode_images(visual: nn.Module, images: Tensor) -> Tensor:
    """Images [M, 3, S, S] -> [M, E]; rows [M, E] are embeddings already (data.features)."""
    embeddings: Tensor = images if images.ndim == 2 else visual(images)
    return embeddings


def encode_frames(visual: nn.Module, pixels: Tensor) -> Tensor:
    """Clips [B, T, 3, S, S] -> frame embeddings [B, T, E], [B, 1, E] from joint attention."""
    embeddings = encode_images(visual, pixels.flatten(0, 1))
    clips: Tensor = embeddings.unflatten(0, (len(pixels), -1))
    return clips


def encode_views(
    visual: nn.Module, videos: Sequence[VideoViews], chunk: int, *, per_clip: bool
) -> list[Tensor]:
    """Frame embeddings of every view of each video, float32 [crops * K, T, E], crop-major.

    Each distinct image goes through the tower once, images of several videos in one forward, at
    most `chunk` of them; views gather their own. That is exact while the tower sees single
    frames. One that mixes frames (`per_clip`) gets its clips written out.
    """
    if per_clip:
        frames = videos[0].frame_index.shape[1]
        clips = torch.cat([video.clips() for video in videos]).split(max(1, chunk // frames))
        views = torch.cat([encode_frames(visual, batch).float() for batch in clips])
        return list(views.split([video.num_views for video in videos]))
    images = [video.images.flatten(0, 1) for video in videos]  # [U * V, 3, S, S]
    encoded = torch.cat(
        [encode_images(visual, batch).float() for batch in torch.cat(images).split(chunk)]
    )
    parts = encoded.split([len(rows) for rows in images])
    return [
        gather_views(rows.unflatten(0, video.images.shape[:2]), video)
        for rows, video in zip(parts, videos, strict=True)
    ]


class HeaderModel(Protocol):
    """A tower, and a temporal header on its frame embeddings; plain_tower: see VideoModel."""

    @property
    def visual(self) -> nn.Module: ...

    @property
    def fusion_model(self) -> nn.Module | None: ...

    @property
    def plain_tower(self) -> bool: ...


def embed_views(model: HeaderModel, videos: Sequence[VideoViews], chunk: int) -> list[Tensor]:
    """Raw embeddings of every view of each video, float32 [crops * K, E], crop-major."""
    frames = encode_views(model.visual, videos, chunk, per_clip=not model.plain_tower)
    views = apply_header(model.fusion_model, torch.cat(frames)).mean(dim=1).float()
    return list(views.split([len(rows) for rows in frames]))


def gather_views(images: Tensor, video: VideoViews) -> Tensor:
    """Per-image rows [U, V, ...] -> those of every view, crop-major: [crops * K, T, ...]."""
    views = images[video.frame_index][:, :, video.crop_index]  # [K, T, crops, ...]
    ordered: Tensor = views.movedim(2, 0)  # [crops, K, T, ...]
    return ordered.flatten(0, 1)


def two_rates(
    model: nn.Module, config: Config, is_new: Callable[[str], bool]
) -> list[dict[str, Any]]:
    """AdamW groups: what CLIP brought at lr * clip_ratio, the parameters named new at lr.

    Every trained parameter decays, as in the official codes; an empty group is left out.
    """
    clip: list[nn.Parameter] = []
    new: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (new if is_new(name) else clip).append(parameter)
    options = config.optim
    groups = [
        {"name": "clip", "params": clip, "lr": options.lr * options.clip_ratio},
        {"name": "new", "params": new, "lr": options.lr},
    ]
    return [{**group, "weight_decay": options.weight_decay} for group in groups if group["params"]]
