"""The pre-LN transformer block of CLIP, on fused kernels, with the two ways into its attention.

Shape letters: M images, N tokens, D width, H heads, K = D / H head width, n tokens of a source.
Parameter names are OpenAI CLIP's. Every parameter is used inside the `forward` of the module that
owns it, which is what ZeRO-3 gathers parameters by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kineticlip.models.architectures import Activation
from kineticlip_kernels.attention import AttentionImpl, attention, class_attention
from kineticlip_kernels.dispatch import Impl
from kineticlip_kernels.mlp import linear_quick_gelu
from kineticlip_kernels.norm import add_layer_norm, layer_norm

KeysValues = tuple[Tensor, Tensor]
# Extra keys and values: tokens [M', n, D] of the residual stream, projected by the block's own
# ln_1, key and value weights; or a function of the block's keys and values [M, N, H, K] that
# gives ready ones [M', n, H, K]. M' divides M: image m reads source row m // (M // M').
Source = Tensor | Callable[[Tensor, Tensor], KeysValues]
Sources = Callable[[int, Tensor], Sequence[Source]]  # (block, residual stream [M, N, D])
Tap = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]  # (block, q, k, v, block output)


class LayerNorm(nn.Module):
    """LayerNorm with fp32 statistics, and the addition before it."""

    def __init__(self, width: int, *, eps: float = 1e-5, kernels: Impl = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps, self.kernels = eps, kernels

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + update, its LayerNorm), both [..., D]."""
        if update is None:
            return x, layer_norm(x, self.weight, self.bias, self.eps, impl=self.kernels)
        return add_layer_norm(x, update, self.weight, self.bias, self.eps, impl=self.kernels)


class LinearActivation(nn.Linear):
    """A linear layer and its activation in one call. [..., D] -> [..., F]."""

    def __init__(self, width: int, out: int, activation: Activation, *, kernels: Impl) -> None:
        super().__init__(width, out)
        self.activation, self.kernels = activation, kernels

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "gelu":
            return F.gelu(F.linear(x, self.weight, self.bias))
        return linear_quick_gelu(x, self.weight, self.bias, impl=self.kernels)


class Mlp(nn.Module):
    """[M, N, D] -> [M, N, D] through a hidden layer."""

    def __init__(self, width: int, hidden: int, activation: Activation, *, kernels: Impl) -> None:
        super().__init__()
        self.c_fc = LinearActivation(width, hidden, activation, kernels=kernels)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.c_fc(y))
        return out


class Attention(nn.Module):
    """Multi-head self-attention with extra sources of keys and values."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kernels: Impl = "auto",
        impl: AttentionImpl = "auto",
        drop_out: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.heads, self.kernels, self.impl, self.drop_out = heads, kernels, impl, drop_out
        self.packed: nn.Module | None = None  # the projection to q, k, v as inference runs it
        self.attend: Callable[..., Tensor] = attention  # or another op of the same arguments

    def forward(
        self, y: Tensor, sources: Sequence[Source] = (), *, class_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """y [M, N, D], normed; sources normed too -> (update [M, N, D], qkv [M, N, 3, H, K]).

        class_only: the class token's update alone, [M, 1, D], keys and values never projected
        (exact), and no qkv; only for sources that are tokens.
        """
        tokens = [source for source in sources if isinstance(source, Tensor)]
        if class_only and len(tokens) == len(sources) and not self._drops:
            mixed = class_attention(
                y,
                self.in_proj_weight,
                self.in_proj_bias,
                heads=self.heads,
                sources=tokens,
                impl=self.kernels,
            )  # [M, H, K]
            return self.out_proj(mixed.flatten(1).unsqueeze(1)), None
        packed = self.packed
        qkv = packed(y) if packed else F.linear(y, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # [M, N, 3, H, K]
        pairs = [self._keys_values(source, qkv) for source in sources]
        if self._drops:
            mixed = self._dropped(qkv, pairs)
        else:
            mixed = self.attend(qkv, sources=pairs, impl=self.impl)
        mixed = mixed[:, :1] if class_only else mixed
        return self.out_proj(mixed.flatten(2)), qkv

    @property
    def _drops(self) -> bool:
        return self.training and self.drop_out > 0

    def _keys_values(self, source: Source, qkv: Tensor) -> KeysValues:
        if not isinstance(source, Tensor):
            return source(qkv[:, :, 1], qkv[:, :, 2])
        width = source.shape[-1]
        kv = F.linear(source, self.in_proj_weight[width:], self.in_proj_bias[width:])
        k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(2)  # [M', n, H, K]
        return k, v

    def _dropped(self, qkv: Tensor, pairs: Sequence[KeysValues]) -> Tensor:
        """Dropout on the attention weights, which only PyTorch's own attention has."""
        rows = len(qkv)
        q, k, v = qkv.unbind(2)
        for extra_k, extra_v in pairs:
            times = rows // len(extra_k)
            k = torch.cat([k, extra_k.repeat_interleave(times, dim=0)], dim=1)
            v = torch.cat([v, extra_v.repeat_interleave(times, dim=0)], dim=1)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [M, H, N, K]
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop_out).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Sizes of a block; what its MLP and its norms compute."""

    width: int
    heads: int
    mlp_width: int
    activation: Activation = "quick_gelu"
    eps: float = 1e-5  # of both norms


class Block(nn.Module):
    """x += attention(ln_1(x)); x += mlp(ln_2(x)).

    The stream travels as a pair (x, update not yet added), so that every addition is one kernel
    with the LayerNorm behind it. control_point, where there is one, changes the stream before
    the attention and, if its `twice` says so, before the MLP. drop_out: of the whole residual
    branches of a row; attention_drop_out: of attention weights.
    """

    def __init__(
        self,
        shape: BlockShape,
        *,
        kernels: Impl = "auto",
        attention: AttentionImpl = "auto",
        drop_out: float = 0.0,
        attention_drop_out: float = 0.0,
        control_point: nn.Module | None = None,
    ) -> None:
        super().__init__()
        width, eps = shape.width, shape.eps
        self.ln_1 = LayerNorm(width, eps=eps, kernels=kernels)
        self.attn = Attention(
            width, shape.heads, kernels=kernels, impl=attention, drop_out=attention_drop_out
        )
        self.ln_2 = LayerNorm(width, eps=eps, kernels=kernels)
        self.mlp = Mlp(width, shape.mlp_width, shape.activation, kernels=kernels)
        self.drop_out = drop_out
        self.control_point = control_point

    def forward(
        self,
        x: Tensor,
        update: Tensor | None = None,
        *,
        sources: Callable[[Tensor], Sequence[Source]] | None = None,
        class_only: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, update), both [M, N, D] -> (x, update, qkv [M, N, 3, H, K]).

        class_only: the class token alone, [M, 1, D]; qkv is None where it was not needed.
        """
        x, y = self._enter(x, update, self.ln_1, first=True)
        extra = [
            self.ln_1(source)[1] if isinstance(source, Tensor) else source
            for source in (sources(x) if sources is not None else ())
        ]
        attended, qkv = self.attn(y, extra, class_only=class_only)
        x = x[:, :1] if class_only else x
        x, y = self._enter(x, self._drop_path(attended), self.ln_2, first=False)
        return x, self._drop_path(self.mlp(y)), qkv

    def initialise_like_clip(self, depth: int) -> None:
        """CLIP's starting values for one of `depth` blocks: narrow behind each residual branch."""
        width = self.attn.out_proj.in_features
        nn.init.normal_(self.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(self.attn.out_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlp.c_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        for linear in (self.attn.out_proj, self.mlp.c_fc, self.mlp.c_proj):
            nn.init.zeros_(linear.bias)

    def _enter(
        self, x: Tensor, update: Tensor | None, norm: nn.Module, *, first: bool
    ) -> tuple[Tensor, Tensor]:
        if self.control_point is None or not (first or self.control_point.twice):
            total, y = norm(x, update)
        else:
            total, y = norm(self.control_point(x if update is None else x + update))
        return total, y

    def _drop_path(self, update: Tensor) -> Tensor:
        """Stochastic depth: rows of the batch lose the update, the others make up for them."""
        if not self.training or self.drop_out == 0:
            return update
        kept = torch.rand(len(update), 1, 1, device=update.device) >= self.drop_out
        return update * kept.to(update.dtype) / (1 - self.drop_out)


class Transformer(nn.Module):
    """Blocks in a row; `checkpointing` recomputes each of them in the backward pass."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)
        self.checkpointing = False

    def forward(
        self,
        x: Tensor,
        *,
        sources: Sources | None = None,
        tap: Tap | None = None,
        class_only: bool = False,
    ) -> Tensor:
        """[M, N, D] -> [M, N, D], or [M, 1, D] with class_only: the class token, exactly."""
        update: Tensor | None = None
        last = len(self.resblocks) - 1
        for index, block in enumerate(self.resblocks):
            run = partial(
                block,
                sources=partial(sources, index) if sources is not None else None,
                class_only=class_only and index == last and tap is None,
            )
            if self.checkpointing and torch.is_grad_enabled():
                x = x if update is None else x + update  # one tensor to keep, not two
                x, update, qkv = checkpoint(run, x, use_reentrant=False)
            else:
                x, update, qkv = run(x, update)
            if tap is not None:
                x, update = x + update, None
                tap(index, qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], x)
        return x if update is None else x + update
