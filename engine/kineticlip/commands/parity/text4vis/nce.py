"""The contrastive losses over real processes, and the gradient that each of them sees."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kineticlip.commands.parity.apart import run_apart
from kineticlip.commands.parity.check import Check, compare, exactly
from kineticlip.commands.parity.text4vis.files import EMBEDDINGS, LOSSES, Golden
from kineticlip.methods.head import cosine_logits
from kineticlip.methods.nce import divergence, gather, matching_loss

KINDS = {"NCE": False, "DS": True}  # recorded name -> dual
GRADIENTS = 1e-5
Array = NDArray[Any]
Numbers = dict[str, Array]


def nce_checks(golden: Golden) -> Iterator[Check]:
    """Every rank's logits, labels, losses and gradients; then one process alone."""
    recorded = golden.arrays("nce")
    scale = recorded["log_logit_scale"]
    pairs = list(zip(recorded["image"], recorded["text"], recorded["labels"], strict=True))
    with tempfile.TemporaryDirectory() as folder:
        ranks = [(rank, len(pairs), folder, *lot, scale) for rank, lot in enumerate(pairs)]
        found = run_apart(_rank, ranks, "nce")
    for rank, numbers in enumerate(found):
        yield from _compared(numbers, recorded, f"rank{rank}")
    alone = pair_loss(*pairs[0], scale)
    yield from _compared(alone, recorded, "single")


def _compared(found: Numbers, recorded: Numbers, prefix: str) -> Iterator[Check]:
    for name, value in found.items():
        key = f"{prefix}/{name}"
        if key not in recorded:
            continue  # a lone process has fewer of them recorded
        if name == "gathered_labels":
            yield exactly(f"nce/{key}", value, recorded[key])
            continue
        tolerance = LOSSES if "loss" in name else GRADIENTS if "grad" in name else EMBEDDINGS
        yield compare(f"nce/{key}", value, recorded[key], atol=tolerance)


def pair_loss(image: Array, text: Array, labels: Array, scale: Array) -> Numbers:
    """What one process computes from its pairs, under the recorded names.

    image, text [b, E]; labels [b]; scale: the logarithm of the logit scale.
    """
    given = [torch.from_numpy(np.array(array)) for array in (image, text, scale)]
    everything = gather(torch.from_numpy(labels))
    same = (everything[:, None] == everything[None, :]).float()
    numbers: dict[str, Tensor] = {"gathered_labels": everything, "ground_truth": same}
    for kind, dual in KINDS.items():
        videos, sentences, log_scale = (tensor.clone().requires_grad_() for tensor in given)
        rows = gather(F.normalize(sentences, dim=-1))
        logits = cosine_logits(gather(videos), rows, log_scale.exp())
        loss = matching_loss(logits, everything, dual=dual)
        loss.backward()
        sides = [divergence(side, same, dual=dual) for side in (logits, logits.T)]
        numbers |= {
            "logits_per_image": logits,
            "logits_per_text": logits.T,
            f"{kind}/loss_img_text_mean": torch.stack([*sides, loss]),
        }
        for name, tensor in zip(
            ("image", "text", "log_logit_scale"), (videos, sentences, log_scale), strict=True
        ):
            assert tensor.grad is not None
            numbers[f"{kind}/grad_{name}"] = tensor.grad
    return {name: tensor.detach().numpy() for name, tensor in numbers.items()}


def _rank(
    rank: int,
    world: int,
    folder: str,
    image: Array,
    text: Array,
    labels: Array,
    scale: Array,
) -> Numbers:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=2),
    )
    numbers = pair_loss(image, text, labels, scale)
    dist.barrier()
    dist.destroy_process_group()
    return numbers
