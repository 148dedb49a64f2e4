"""Learned words around a class name (CoOp, as Vita-CLIP uses it), for CLIP's text tower.

Shape letters: C classes, n context words, L tokens up to the longest end-of-text, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kineticlip.models.text import tokenize, tokenizer
from kineticlip.runtime.errors import UserError

log = logging.getLogger(__name__)

Position = Literal["end", "middle", "front"]


def clean(name: str) -> str:
    """A class name as a prompt writes it."""
    return name.replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class Placeholders:
    """Token rows of `X X ... name.` and where things stand in them.

    tokens: int64 [C, 77]; context: how many placeholders follow the start token; lengths: tokens
    of each class name, the full stop not counted.
    """

    tokens: Tensor
    context: int
    lengths: tuple[int, ...]

    @classmethod
    def of(
        cls, names: Sequence[str], *, context: int, words: str = "", context_length: int = 77
    ) -> Placeholders:
        """words (underscores are spaces) stand for the placeholders, one each; else `context` X."""
        words = clean(words)
        prefix = words or " ".join(["X"] * context)
        count = len(words.split(" ")) if words else context
        cleaned = [clean(name) for name in names]
        encode = tokenizer(context_length).encode
        return cls(
            tokens=tokenize([f"{prefix} {name}." for name in cleaned], context_length),
            context=count,
            lengths=tuple(len(encode(name)) for name in cleaned),
        )


class TextPrompts(nn.Module):
    """`ctx`, shared [n, W] or one for each class [C, n, W], put into embedded placeholders.

    end: before the name, middle: half of it on each side, front: behind the name. The end-of-text
    token stays where the placeholders put it.
    """

    tokens: Tensor
    order: Tensor
    ends: Tensor

    def __init__(self, rows: Placeholders, context: Tensor, *, position: Position = "end") -> None:
        super().__init__()
        self.ctx = nn.Parameter(context)
        self.register_buffer("tokens", rows.tokens)
        self.register_buffer("ends", rows.tokens.argmax(dim=-1), persistent=False)  # [C]
        self.length = int(self.ends.max()) + 1  # L
        order = [
            _order(self.length, context=rows.context, name=name, position=position)
            for name in rows.lengths
        ]
        self.register_buffer("order", torch.tensor(order), persistent=False)  # [C, L]

    def forward(self, embedded: Tensor) -> Tensor:
        """Embedded placeholders [C, L, W] -> prompts [C, L, W]."""
        context = self.ctx.expand(len(embedded), *self.ctx.shape[-2:])  # [C, n, W]
        both = torch.cat([embedded, context.to(embedded.dtype)], dim=1)  # [C, L + n, W]
        return torch.take_along_dim(both, self.order.unsqueeze(-1), dim=1)


def _order(length: int, *, context: int, name: int, position: Position) -> list[int]:
    """For every place of a prompt, the place in [placeholder tokens, context] that fills it."""
    learned = list(range(length, length + context))
    start = 1 + context
    words, rest = list(range(start, start + name)), list(range(start + name, length))
    half = context // 2
    parts = {
        "end": [*learned, *words],
        "middle": [*learned[:half], *words, *learned[half:]],
        "front": [*words, *learned],
    }
    return [0, *parts[position], *rest]


def new_context(
    rows: Placeholders,
    embedding: Any,
    *,
    words: str,
    per_class: bool,
    position: Position,
) -> Tensor:
    """Initial `ctx`: the embeddings of the words, shared by all classes, or N(0, 0.02).

    A word of several tokens lends its first ones; the others stay in front of the name, fixed,
    which only `end` can express.
    """
    if not words:
        size = (rows.context, embedding.weight.shape[1])
        shape = (len(rows.tokens), *size) if per_class else size
        return torch.empty(shape).normal_(std=0.02)
    pieces = len(tokenizer().encode(clean(words)))
    if pieces != rows.context and position != "end":
        raise UserError(
            f"vitaclip.context_words: '{words}' is {rows.context} words but {pieces} tokens; "
            f"position {position} needs words of one token"
        )
    chosen = rows.tokens[0, 1 : 1 + rows.context]
    start: Tensor = embedding.weight[chosen].detach().float().clone()
    return start
