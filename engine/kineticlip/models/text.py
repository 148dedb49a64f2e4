"""CLIP's text tower (open_clip's code) and the features of prompts, kept on disk once computed.

Shape letters: C prompts, n tokens, W width, E embedding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kineticlip.models.architectures import TextShape
from kineticlip.models.weights import Weights
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_atomic

log = logging.getLogger(__name__)

BATCH = 64  # prompts per forward


def text_tower(shape: TextShape, state: Mapping[str, Tensor] | None, *, seed: int = 0) -> Any:
    """open_clip's text transformer with the weights of a CLIP state dict, float32, in eval mode.

    state: OpenAI's keys, anything but the text tower is ignored; None: seeded random weights.
    Raises UserError where the state has no text tower or one of another shape.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta" if state else "cpu"):
        torch.manual_seed(seed)
        tower = TextTransformer(
            context_length=shape.context,
            vocab_size=shape.vocabulary,
            width=shape.width,
            heads=shape.heads,
            layers=shape.layers,
            mlp_ratio=shape.mlp_width / shape.width,
            output_dim=shape.embed,
            act_layer=QuickGELU if shape.activation == "quick_gelu" else nn.GELU,
        )
    if state:
        tower.attn_mask = tower.build_causal_mask()  # a buffer, made on the meta device too
        own = tower.state_dict()
        for name, parameter in own.items():
            if name not in state:
                raise UserError(f"no text tower in these weights: '{name}' is missing")
            if state[name].shape != parameter.shape:
                raise UserError(
                    f"another text tower: '{name}' is {tuple(state[name].shape)}, "
                    f"expected {tuple(parameter.shape)}"
                )
        tower.load_state_dict({name: state[name].float() for name in own}, assign=True)
    return tower.eval()


@cache
def tokenizer(context: int = 77) -> SimpleTokenizer:
    """CLIP's BPE tokenizer; lower-cases, repairs and unescapes the text first."""
    return SimpleTokenizer(context_length=context)


def tokenize(prompts: Sequence[str], context: int = 77, *, truncate: bool = False) -> Tensor:
    """int64 [C, context]: start, the text's tokens, end, zeros.

    UserError where one is too long, or with `truncate` only as much of it as fits.
    """
    bpe = tokenizer(context)
    for prompt in () if truncate else prompts:
        length = len(bpe.encode(prompt)) + 2
        if length > context:
            raise UserError(f"prompt of {length} tokens, at most {context}: {prompt!r}")
    tokens: Tensor = bpe(list(prompts))
    return tokens


def encode_text(tower: Any, tokens: Tensor) -> Tensor:
    """Features of token rows [C, n] -> [C, E], not normalised.

    What stands behind the last end-of-text token cannot be seen through the causal mask, so it is
    not computed: K400's prompts are 18 tokens of 77.
    """
    ends = tokens.argmax(dim=-1)  # the end-of-text token has the largest id
    embedded = tower.token_embedding(tokens[:, : int(ends.max()) + 1])
    return encode_embedded(tower, embedded, ends)


def encode_embedded(tower: Any, embedded: Tensor, ends: Tensor) -> Tensor:
    """Features of token embeddings [C, n, W] (positions not added), end-of-text at ends [C].

    The way in for learned prompts. -> [C, E], not normalised.
    """
    x = encode_tokens(tower, embedded)  # [C, n, W]
    features: Tensor = x[torch.arange(len(x), device=x.device), ends] @ tower.text_projection
    return features


def encode_tokens(tower: Any, embedded: Tensor) -> Tensor:
    """Every token through the tower and its last norm. [C, n, W] -> [C, n, W]."""
    length = embedded.shape[1]
    x = embedded + tower.positional_embedding[:length]
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    out: Tensor = tower.ln_final(x)
    return out


def text_features(
    weights: Weights,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    truncate: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Features of prompts in float32, not normalised: [C, E]. Computed once, then read from disk.

    seed: of random weights. truncate: as in `tokenize`. device: where the tower runs; the result
    is on the CPU. The file's name is a hash of the weights' bytes, the tower's shape, every
    prompt and open_clip's version, so nothing stale can be found. Random weights are not kept.
    """
    shape = weights.model.text
    path = _cache_path(weights, prompts) if weights.path is not None else None
    if path is not None and path.is_file():
        kept = _read_cached(path)
        if kept is not None:
            return kept
    tokens = tokenize(prompts, shape.context, truncate=truncate)
    state = weights.clip if weights.path is not None else None
    tower = text_tower(shape, state, seed=seed).to(device)
    with torch.inference_mode():
        batches = tokens.split(BATCH)
        features = torch.cat([encode_text(tower, rows.to(device)).cpu() for rows in batches])
    features = features.clone()  # out of inference mode
    if path is not None:
        _write_cached(path, features)
    return features


def _cache_path(weights: Weights, prompts: Sequence[str]) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    description = {
        "weights": weights.fingerprint,
        "rounded": weights.rounded,
        "tower": dataclasses.asdict(weights.model.text),
        "prompts": list(prompts),
        "open_clip": open_clip.__version__,
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    return Path(root) / "kineticlip" / "text" / f"{key}.safetensors"


def _read_cached(path: Path) -> Tensor | None:
    try:
        with safe_open(path, "pt") as file:
            features: Tensor = file.get_tensor("features")
    except (SafetensorError, OSError) as error:
        log.warning("%s: unreadable, computing the text features again: %s", path, error)
        return None
    return features


def _write_cached(path: Path, features: Tensor) -> None:
    try:
        write_atomic(path, save({"features": features.contiguous()}))
    except UserError as error:
        log.warning("the text features are not kept: %s", error)
