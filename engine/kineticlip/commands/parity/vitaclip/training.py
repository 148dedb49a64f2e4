"""Vita-CLIP trained: gradients, optimiser steps, the official script's own run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from kineticlip.commands.parity.check import Check, compare, exactly
from kineticlip.commands.parity.vitaclip.golden import Golden, close, load, read_json
from kineticlip.config import Config
from kineticlip.data.batch import Batch
from kineticlip.formats.names import split_projections
from kineticlip.methods.vitaclip import METHOD, VitaCLIP
from kineticlip.training.optim import build_optimizer, rate_factor

GRADIENT = 1e-4  # of a gradient's largest magnitude
STEPPED = 2e-5  # absolute, of parameters after a few steps of AdamW
LOSS = 2e-5
ROUNDING_ONLY = "summary_attn_layer.k_proj.bias"  # its gradient is zero but for rounding


class Accumulating:
    """Stands where a DeepSpeed engine does: knows which micro-batch ends a step."""

    def __init__(self, model: VitaCLIP, splits: int) -> None:
        self.model, self.splits, self.calls = model.train(), splits, 0

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.model(*inputs, **options)

    def is_gradient_accumulation_boundary(self) -> bool:
        self.calls += 1
        return self.calls % self.splits == 0

    def backward(self, clips: Tensor, labels: Tensor) -> float:
        """All micro-batches of a step; returns the step's loss."""
        total = 0.0
        for pixels, truth in zip(clips.chunk(self.splits), labels.chunk(self.splits), strict=True):
            batch = Batch(pixels=pixels, labels=truth, names=("",) * len(truth))
            loss, _ = METHOD.loss(self, batch)
            cast(Any, loss / self.splits).backward()
            total += float(loss.detach()) / self.splits
        return total


def official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours under the official names, for what trains."""
    apart = split_projections(dict(tensors), tower="prompts.")
    return {name.replace("prompts.", "visual.", 1): tensor for name, tensor in apart.items()}


def gradients(golden: Golden) -> Iterator[Check]:
    """Loss and gradients in one batch, and in micro-batches that share their text features."""
    expected = load(golden.folder / "grads")
    contexts = load(golden.folder / "text_variants")
    for case in sorted({".".join(name.split(".")[:2]) for name in expected}):
        variant, split = case.split(".")
        model = golden.model(variant, context=contexts[f"{variant}.ctx"])
        engine = Accumulating(model, int(split.removeprefix("split")))
        loss = engine.backward(golden.clips, golden.labels)
        yield close(f"gradients {case} loss", torch.tensor(loss), expected[f"{case}.loss"], LOSS)
        found = official({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        if split == "split1" and variant == "csc_end":
            trained = sorted(name for name in found)
            yield exactly(f"gradients {case} trained", trained, sorted(golden.config["trainable"]))
        prefix = f"{case}.grad."
        for name, want in expected.items():
            if name.startswith(prefix) and not name.endswith(ROUNDING_ONLY):
                gradient = found[name.removeprefix(prefix)]
                yield close(f"gradients {name}", gradient, want, GRADIENT)


def _trained(golden: Golden) -> tuple[VitaCLIP, torch.optim.AdamW, Config]:
    model, config = golden.model(), golden.settings()
    return model, build_optimizer(METHOD.param_groups(model, config), config.optim), config


def _set_rate(optimizer: torch.optim.AdamW, config: Config, step: int, length: int) -> float:
    rate = config.optim.lr * rate_factor(step, config.optim, epochs=length)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def three_steps(golden: Golden) -> Iterator[Check]:
    """Three steps of AdamW under the cosine, in micro-batches."""
    expected = load(golden.folder / "adamw3")
    recorded = golden.config
    model, optimizer, config = _trained(golden)
    config = replace(config, optim=replace(config.optim, betas=tuple(recorded["betas"])))
    engine = Accumulating(model, recorded["batch_split"])
    for step in recorded["steps"]:
        rate = _set_rate(optimizer, config, step["step"], recorded["T_max"])
        loss = engine.backward(golden.clips, golden.labels)
        optimizer.step()
        optimizer.zero_grad()
        where = f"AdamW step {step['step']}"
        yield compare(f"{where} rate", rate, step["lr"], atol=1e-9)
        yield compare(f"{where} loss", loss, step["loss"], atol=LOSS)
    yield from _parameters("AdamW", model, expected)
    with torch.inference_mode():
        logits = model.eval()(golden.clips)
    yield close("AdamW logits after", logits, expected["__logits_after"], GRADIENT)


def _parameters(what: str, model: VitaCLIP, expected: Mapping[str, Tensor]) -> Iterator[Check]:
    found = official({name: p.detach() for name, p in model.named_parameters()})
    for name, want in expected.items():
        if not name.startswith("__") and not name.endswith(ROUNDING_ONLY):
            yield compare(f"{what} {name}", found[name], want, atol=STEPPED)


def main_run(golden: Golden) -> Iterator[Check]:
    """The official training script itself: losses, rates, evaluations, final parameters."""
    recorded = read_json(golden.folder / "main_run.json")
    flags = dict(zip(recorded["argv"], recorded["argv"][1:], strict=False))
    size, splits = int(flags["--batch_size"]), int(flags["--batch_split"])
    length, every = int(flags["--num_steps"]), int(flags["--eval_freq"])
    model, optimizer, config = _trained(golden)
    engine = Accumulating(model, splits)
    order = torch.tensor(recorded["sampler_indices"]).split(size)
    evaluations = iter(recorded["eval_top1_top5"])
    for step, (rows, printed) in enumerate(zip(order, recorded["steps"], strict=True)):
        _set_rate(optimizer, config, step, length)
        model.eval()
        with torch.inference_mode():
            hits = _hits(model(golden.clips[rows]), golden.labels[rows])
        loss = engine.backward(golden.clips[rows], golden.labels[rows]) if model.train() else 0.0
        optimizer.step()
        optimizer.zero_grad()
        following = config.optim.lr * rate_factor(step + 1, config.optim, epochs=length)
        yield compare(f"main step {step} loss", loss, printed["loss"], atol=LOSS)
        yield compare(f"main step {step} hits", hits, [printed["acc1"], printed["acc5"]], atol=0.01)
        yield compare(f"main step {step} next rate", following, printed["lr_printed"], atol=6e-7)
        if (step + 1) % every == 0:
            with torch.inference_mode():
                found = _hits(model.eval()(golden.clips), golden.labels)
            want = [float(value) for value in next(evaluations)]
            yield compare(f"main evaluation {step + 1}", found, want, atol=0.01)
    yield from _parameters("main", model, load(golden.folder / "main_run"))


def _hits(logits: Tensor, labels: Tensor) -> list[float]:
    """Top-1 and top-5 in percent."""
    order = logits.argsort(dim=-1, descending=True)[:, :5] == labels[:, None]
    return [100 * float(order[:, :k].any(dim=1).float().mean()) for k in (1, 5)]
