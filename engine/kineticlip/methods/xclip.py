"""X-CLIP (ECCV'22): message tokens between frames, frame integration, text that sees the video.

The message token is Vita-CLIP's summary token. Shape letters: B clips, T frames, M = B * T
images, N tokens, P = N - 1 patches, D width, E embedding, C classes, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.formats import load_into
from kineticlip.methods.clips import distinct_clips
from kineticlip.methods.head import average_views, cross_entropy, kernels_of
from kineticlip.methods.method import Method, Metrics
from kineticlip.methods.prompts_text import clean
from kineticlip.methods.prompts_vision import BlockPrompts
from kineticlip.methods.text4vis import LOGIT_SCALE
from kineticlip.methods.text_side import adopt_text_tower, own_text_tower, under
from kineticlip.methods.trunk import FrozenTensors, build_visual, seeded, vit_of
from kineticlip.methods.xclip_cost import cost
from kineticlip.models.architectures import Architecture, VisionShape
from kineticlip.models.prompts import expand_templates, render
from kineticlip.models.text import BATCH, encode_text, tokenize
from kineticlip.models.transformer import Block, BlockShape, LayerNorm, Transformer
from kineticlip.models.weights import Weights
from kineticlip.runtime.errors import UserError


class Messages(nn.Module):
    """One message token for every frame in every block: `blocks.i` are summary tokens alone."""

    def __init__(self, shape: VisionShape, frames: int, config: Config) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            BlockPrompts(
                shape.width,
                shape.heads,
                frames=frames,
                summary=True,
                local=False,
                kernels=config.model.kernels,
                attention=config.model.attention,
            )
            for _ in range(shape.layers)
        )
        for block in cast("list[BlockPrompts]", list(self.blocks)):
            nn.init.xavier_uniform_(block.summary_attn_layer.in_proj_weight)

    def forward(self, block: int, x: Tensor) -> list[Tensor]:
        """Sources of one block from its residual stream x [M, N, D]: [M, 1, D]."""
        return [source.to(x.dtype) for source in self.blocks[block](x[:, 0])]


class FrameIntegration(nn.Module):
    """Frames attend to each other, residual outside, then their mean. [B, T, E] -> [B, E]."""

    def __init__(self, embed: int, frames: int, *, layers: int, heads: int) -> None:
        super().__init__()
        self.position_embedding = nn.Parameter(torch.empty(1, frames, embed))
        shape = BlockShape(width=embed, heads=heads, mlp_width=4 * embed)
        self.transformer = Transformer([Block(shape) for _ in range(layers)])
        nn.init.normal_(self.position_embedding, std=0.02)
        for block in cast("list[Block]", list(self.transformer.resblocks)):
            block.initialise_like_clip(layers)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames.to(self.position_embedding.dtype)
        out: Tensor = self.transformer(x + self.position_embedding) + x
        return out.mean(dim=1)


class CrossAttention(nn.Module):
    """Text [B, C, E] looks at patches [B, P, E] -> [B, C, E]."""

    def __init__(self, embed: int, heads: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(embed, embed, bias=False)
        self.k_proj = nn.Linear(embed, embed, bias=False)
        self.v_proj = nn.Linear(embed, embed, bias=False)
        self.proj = nn.Linear(embed, embed)
        self.heads = heads

    def forward(self, text: Tensor, patches: Tensor) -> Tensor:
        q, k, v = (
            layer(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, rows, E / H]
            for layer, rows in ((self.q_proj, text), (self.k_proj, patches), (self.v_proj, patches))
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(mixed)
        return out


class PromptLayer(nn.Module):
    """text += attention(norm1(text), patches); text += mlp(norm3(text))."""

    def __init__(self, embed: int, heads: int) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(embed, heads)
        self.norm1 = nn.LayerNorm(embed)
        self.norm3 = nn.LayerNorm(embed)
        self.mlp = nn.Sequential(
            nn.Linear(embed, 4 * embed), QuickGELU(), nn.Dropout(0.0), nn.Linear(4 * embed, embed)
        )

    def forward(self, text: Tensor, patches: Tensor) -> Tensor:
        text = text + self.cross_attn(self.norm1(text), patches)
        out: Tensor = text + self.mlp(self.norm3(text))
        return out


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class PromptGenerator(nn.Module):
    """What a video adds to the text of every class: alpha * layers(text, patches)."""

    def __init__(self, embed: int, *, layers: int, heads: int, scale: float) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(embed)
        self.decoder = nn.ModuleList(PromptLayer(embed, heads) for _ in range(layers))
        self.alpha = nn.Parameter(torch.full((embed,), scale))

    def forward(self, text: Tensor, patches: Tensor) -> Tensor:
        """text [B, C, E], patches [B, P, E] -> [B, C, E]."""
        patches = self.layernorm(patches)
        for layer in self.decoder:
            text = layer(text, patches)
        return self.alpha * text


class XCLIP(nn.Module):
    """All parts under their names in `formats`; the text tower's are OpenAI's, at the root.

    tokens: [C, n], the sentences of the classes.
    """

    plain_tower = False  # its attention gets message tokens as sources
    classifier: Tensor | None = None  # the text depends on the video
    text_projection: Tensor

    def __init__(
        self,
        visual: nn.Module,
        model: Architecture,
        config: Config,
        *,
        tower: Any,
        tokens: Tensor,
    ) -> None:
        super().__init__()
        shape, options, embed = vit_of(model, "X-CLIP"), config.xclip, model.embed
        frames = config.data.num_frames
        self.visual, self.frames = visual, frames
        self.prompts = Messages(shape, frames, config)
        self.mit = FrameIntegration(
            embed,
            frames,
            layers=options.integration_layers,
            heads=options.integration_heads or embed // 64,
        )
        self.prompts_visual_layernorm = LayerNorm(shape.width)
        self.prompts_visual_projection = nn.Parameter(torch.empty(shape.width, embed))
        nn.init.normal_(self.prompts_visual_projection, std=shape.width**-0.5)
        self.prompts_generator = PromptGenerator(
            embed,
            layers=options.prompt_layers,
            heads=options.prompt_heads,
            scale=options.prompt_scale,
        )
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.untrained: tuple[str, ...] = ()
        self.frozen = FrozenTensors(attn_mask=adopt_text_tower(self, tower), tokens=tokens)
        self._kept: Tensor | None = None

    @property
    def attn_mask(self) -> Tensor:
        """The causal mask, in the dtype of the tower: this module can stand for one."""
        return cast(Tensor, self.frozen.attn_mask).to(self.text_projection.dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, T, 3, S, S], uint8 or normalised -> float32 logits [B, C]."""
        videos, patches = self.encode_clips(pixels)
        text = self.class_features()
        text = text.expand(len(videos), *text.shape)  # [B, C, E]
        text = text + self.prompts_generator(text, patches)
        scale = self.logit_scale.float().exp()
        videos, text = (F.normalize(rows.float(), dim=-1) for rows in (videos, text))
        return scale * torch.einsum("be,bce->bc", videos, text)

    def encode_clips(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B, T, 3, S, S] -> videos [B, E], patches averaged over time [B, P, E]."""
        frames = pixels.shape[1]
        if frames != self.frames:
            raise UserError(
                f"data.num_frames: this X-CLIP integrates {self.frames} frames, not {frames}"
            )
        last: list[Tensor] = []

        def tap(block: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
            last[:] = [out]

        embeddings = self.visual(pixels.flatten(0, 1), sources=self.prompts, tap=tap)  # [M, E]
        videos = self.mit(embeddings.unflatten(0, (-1, frames)))
        weight = self.prompts_visual_projection
        _, patches = self.prompts_visual_layernorm(last[0][:, 1:].to(weight.dtype))  # [M, P, D]
        # the projection is linear: the mean over time goes first, at 1 / T of its cost
        patches = patches.unflatten(0, (-1, frames)).mean(dim=1) @ weight
        return videos, patches

    def class_features(self) -> Tensor:
        """Text features [C, E], not normalised; encoded once where the tower does not train."""
        tokens = cast(Tensor, self.frozen.tokens)
        if self.training and torch.is_grad_enabled() and self.text_projection.requires_grad:
            return encode_text(self, tokens)
        if self._kept is None:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = torch.cat([encode_text(self, rows) for rows in tokens.split(BATCH)])
        return self._kept

    def train(self, mode: bool = True) -> XCLIP:
        """As always; the classes will be encoded again, since weights may have changed."""
        self._kept = None
        super().train(mode)
        return self


# What X-CLIP adds to CLIP, by the first word of its names.
NEW = ("prompts", "mit", "prompts_visual_layernorm", "prompts_visual_projection",
       "prompts_generator")  # fmt: skip


def build(config: Config, class_names: Sequence[str]) -> XCLIP:
    """The model of a configuration; weights of CLIP, or of transformers' XCLIPModel."""
    weights = METHOD.weights(config)
    context = weights.model.text.context
    template = expand_templates((config.classifier.template,))[0]
    sentences = render(template, [clean(name) for name in class_names])
    return xclip_model(config, weights, tokenize(sentences, context))


def xclip_model(config: Config, weights: Weights, tokens: Tensor) -> XCLIP:
    """The model with these weights and token rows [C, n]."""
    vit_of(weights.model, "X-CLIP")
    tensors = weights.tensors if weights.path is not None else {}
    embed, heads = weights.model.embed, config.xclip.prompt_heads
    if embed % heads:
        raise UserError(f"xclip.prompt_heads: {heads} heads do not divide a width of {embed}")
    visual = build_visual(config, weights)
    tower = own_text_tower(config, weights, tensors).requires_grad_(config.xclip.train_text)
    with seeded(config.seed):
        model = XCLIP(visual, weights.model, config, tower=tower, tokens=tokens)
    if "logit_scale" in tensors:
        with torch.no_grad():
            model.logit_scale.copy_(tensors["logit_scale"])
    trained = {name: t for name, t in tensors.items() if name.split(".")[0] in NEW}
    if trained:
        _load(model, trained, weights.source)
    else:
        model.untrained = NEW if weights.path is not None else ("visual", *NEW)
    return model


def _load(model: XCLIP, trained: dict[str, Tensor], source: str) -> None:
    found = trained.get("mit.position_embedding")
    if found is not None and found.shape[1] != model.frames:
        raise UserError(
            f"data.num_frames: {source} integrates {found.shape[1]} frames, not {model.frames}"
        )
    for part in NEW:
        module = getattr(model, part)
        if isinstance(module, nn.Module):
            load_into(module, under(f"{part}.", trained), what=f"{part} of {source}")
        elif part in trained:
            with torch.no_grad():
                module.copy_(trained[part])


def loss(model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Metrics]:
    """Cross entropy over the classes."""
    return cross_entropy(model, batch)


def score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    """Probabilities [len(videos), C]: the mean over a video's views of their softmax.

    The text depends on the video, so logits are taken clip by clip; repeats once.
    """
    assert isinstance(model, XCLIP)
    pairs = [distinct_clips(video) for video in videos]
    clips = torch.cat([pixels for pixels, _ in pairs])
    batches = clips.split(max(1, chunk // clips.shape[1]))
    logits = torch.cat([model(batch) for batch in batches])  # [clips, C]
    parts = logits.split([len(pixels) for pixels, _ in pairs])
    views = [rows[place] for rows, (_, place) in zip(parts, pairs, strict=True)]
    return average_views(torch.cat(views), [len(rows) for rows in views], kernels=kernels_of(model))


def param_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """CLIP's parameters at lr * clip_ratio, new ones at lr; vectors and scalars do not decay."""
    options = config.optim
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.split(".")[0] in NEW, parameter.dim() > 1)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "name": f"{'new' if new else 'clip'} {'matrices' if matrices else 'vectors'}",
            "params": params,
            "lr": options.lr * (1.0 if new else options.clip_ratio),
            "weight_decay": options.weight_decay if matrices else 0.0,
        }
        for (new, matrices), params in groups.items()
    ]


METHOD = Method(build=build, loss=loss, score=score, param_groups=param_groups, cost=cost)
