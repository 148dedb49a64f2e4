"""A text tower that lives at the root of a model, under OpenAI's names, and trains with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.models.classifier import text_weights
from kineticlip.models.text import text_tower
from kineticlip.models.weights import Weights
from kineticlip.runtime.errors import UserError


def adopt_text_tower(model: nn.Module, tower: Any) -> Tensor:
    """Moves a tower's parts into the model, which can stand for the tower from then on.

    Returns the causal mask: the model keeps it where no state dict sees it, as `attn_mask`.
    """
    model.token_embedding = tower.token_embedding
    model.positional_embedding = tower.positional_embedding
    model.transformer = tower.transformer
    model.ln_final = tower.ln_final
    model.text_projection = tower.text_projection
    mask: Tensor = tower.attn_mask
    return mask


def online_tower(config: Config, weights: Weights) -> Any:
    """The text tower of the configuration as a module of its own."""
    source, key = text_weights(config, weights)
    state = source.clip if source.path is not None else None
    try:
        return text_tower(source.model.text, state, seed=config.seed)
    except UserError as error:
        raise UserError(f"{key}: {source.source}: {error}") from None


def own_text_tower(config: Config, weights: Weights, tensors: Mapping[str, Tensor]) -> Any:
    """The tower of the weights; that of classifier.text_weights where they have none."""
    if "token_embedding.weight" in tensors:
        return text_tower(weights.model.text, weights.clip)
    return online_tower(config, weights)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
