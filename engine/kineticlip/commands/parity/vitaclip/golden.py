"""The recorded outputs of Vita-CLIP: the files, and the engine's model of their sizes.

Shape letters: B clips, T frames, F frames of the model, S side.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from kineticlip.commands.parity.check import Check, compare
from kineticlip.config import Config, DataConfig, OptimConfig, VitaConfig
from kineticlip.methods.vitaclip import VitaCLIP, vita_model
from kineticlip.models.architectures import Architecture, TextShape, VisionShape
from kineticlip.models.weights import Weights

RTOL = 2e-5  # of a file's largest magnitude: another order of fp32 sums
ALL = "s1l1g1"
PLACES = {"summary": 1, "local": 3, "global": 5}  # where such a word says which prompts are on


@dataclass(frozen=True, kw_only=True)
class Golden:
    """The recorded model under its official names, and how to build it with our engine."""

    folder: Path
    scratch: Path
    config: dict[str, Any]
    variants: dict[str, Any]
    weights: dict[str, Tensor]
    clips: Tensor  # float32 [B, T, 3, S, S]
    labels: Tensor

    @classmethod
    def read(cls, folder: Path, scratch: Path) -> Golden:
        config = read_json(folder / "config.json")
        stored = {name: tensor for name, tensor in load(folder / "weights").items()}
        ids = stored.pop("__token_embedding_ids").long()
        rows = stored.pop("__token_embedding_rows")
        embedding = torch.zeros(config["cfg"]["text_vocab_size"], rows.shape[1])
        embedding[ids] = rows
        inputs = load(folder / "inputs")
        return cls(
            folder=folder,
            scratch=scratch,
            config=config,
            variants=read_json(folder / "tokens.json"),
            weights={**stored, "textual.token_embedding.weight": embedding},
            clips=clips_of(inputs["x_int8_div32"]),
            labels=inputs["labels"].long(),
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.config["classes"])

    @property
    def architecture(self) -> Architecture:
        c = self.config["cfg"]
        width, text = c["feature_dim"], c["text_transformer_width"]
        rows, columns = c["input_size"]
        return Architecture(
            name="golden",
            vision=VisionShape(
                resolution=columns,
                height=0 if rows == columns else rows,
                patch=c["patch_size"][0],
                width=width,
                layers=c["num_layers"],
                heads=c["num_heads"],
                embed=c["embed_dim"],
                mlp_width=round(c["mlp_factor"] * width),
            ),
            text=TextShape(
                width=text,
                heads=c["text_transformer_heads"],
                layers=c["text_transformer_layers"],
                embed=c["embed_dim"],
                mlp_width=4 * text,
                context=c["text_context_length"],
                vocabulary=c["text_vocab_size"],
            ),
        )

    def model(
        self,
        variant: str = "csc_end",
        *,
        flags: str = ALL,
        frames: int = 0,
        context: Tensor | None = None,
        trained_context: bool = True,
        **options: Any,
    ) -> VitaCLIP:
        """The engine's model from a checkpoint file as the official code writes it.

        context: another `ctx` than the one stored; without trained_context there is none.
        """
        off = [kind for kind, place in PLACES.items() if flags[place] == "0"]
        state = {n: t for n, t in self.weights.items() if not any(kind in n for kind in off)}
        if context is not None:
            state["prompt_learner.ctx"] = context
        if not trained_context:
            state = {n: t for n, t in state.items() if not n.startswith("prompt_learner.")}
        path = self.scratch / "checkpoint.pth"
        torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
        weights = Weights(self.architecture, str(path), path)
        config = self.settings(variant, flags=flags, frames=frames, **options)
        return vita_model(config, weights, self.names)

    def settings(
        self, variant: str = "csc_end", *, flags: str = ALL, frames: int = 0, **options: Any
    ) -> Config:
        c = self.config["cfg"]
        summary, local, global_prompts = (flags[place] == "1" for place in PLACES.values())
        words = self.config["init_text"] if variant.startswith("init_") else ""
        vita = VitaConfig(
            summary=summary,
            local_prompts=local,
            global_prompts=c["num_global_prompts"] if global_prompts else 0,
            context=c["text_num_prompts"],
            context_words=words,
            position=self.variants[variant]["pos"],
            per_class="csc" in variant,
            **options.pop("vita", {}),
        )
        return Config(
            method="vitaclip",
            data=DataConfig(num_frames=frames or c["num_frames"], resolution=c["input_size"][1]),
            vitaclip=vita,
            optim=OptimConfig(
                lr=self.config["lr"],
                weight_decay=self.config["weight_decay"],
                warmup_epochs=0,
                schedule="cosine",
            ),
            **options,
        )


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def load(stem: Path) -> dict[str, Tensor]:
    """A safetensors file, floating-point tensors as float32."""
    path = stem.with_suffix(".safetensors")
    path.stat()  # a missing file is reported under its own name
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(path).items()
    }


def clips_of(stored: Tensor) -> Tensor:
    """int8 [B, 3, T, S, S] -> float32 [B, T, 3, S, S]."""
    return stored.float().div(32).transpose(1, 2).contiguous()


def close(name: str, actual: Tensor, expected: Tensor, tolerance: float = RTOL) -> Check:
    return compare(name, actual, expected, atol=tolerance, relative=True)
