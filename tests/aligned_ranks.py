"""A rank program: starts the engine of every method and prints where a weight is not aligned.

`python tests/aligned_ranks.py STAGE [METHOD ...]`, alone or under the deepspeed launcher. The last
line of the first rank is "N tensors of M methods looked at".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kineticlip.config import load_config
from kineticlip.data.batch import Batch
from kineticlip.methods import METHODS
from kineticlip.runtime.distributed import Ranks, finish, gather, initialise, read_ranks
from kineticlip.training.engine import start, whole
from kineticlip.training.job import Job

NAMES = ("archery", "bowling", "juggling balls", "swimming", "tai chi")  # an odd number of rows
BYTES = 16


class NoClips:
    def __len__(self) -> int:
        return 4

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        raise AssertionError("nothing is trained here")


def job_of(method: str, stage: int, ranks: Ranks, device: torch.device) -> Job:
    config = load_config(
        None,
        [
            f"method={method}", "model.arch=ViT-tiny-16", "model.weights=random",
            "classifier.text_weights=random", "data.resolution=64", "data.num_frames=4",
            f"train.zero_stage={stage}", "train.precision=bf16", "train.micro_batch_size=1",
            f"train.batch_size={ranks.world_size}",
        ],
    )  # fmt: skip
    record = METHODS[method]
    model = record.build(config, NAMES)
    return Job(
        config=config, method=record, model=model, loader=NoClips(), ranks=ranks, device=device
    )


def addresses(model: nn.Module, job: Job) -> Iterator[tuple[str, int]]:
    """(name, address) of every trained tensor; at stage 3 of its part here and of the whole."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if job.config.train.zero_stage == 3:
        for name, parameter in trained.items():
            part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]  # set by DeepSpeed
            yield f"{name}, part", part.data_ptr()
    with whole(model, job.config.train):
        for name, parameter in trained.items():
            yield name, parameter.data_ptr()


def misaligned(
    method: str, stage: int, ranks: Ranks, device: torch.device
) -> tuple[int, list[str]]:
    """(tensors looked at, those that do not lie on a 16-byte address on some rank)."""
    job = job_of(method, stage, ranks, device)
    engine = start(job).engine
    found = dict(addresses(engine.module, job))
    bad = [f"{method}: {name}" for name, address in found.items() if address % BYTES]
    engine.destroy()
    return len(found), [name for share in gather(bad, ranks) for name in share]


def main(words: Sequence[str]) -> int:
    stage, *methods = words
    ranks = read_ranks(os.environ)
    device = initialise(ranks)
    looked_at = 0
    # EVL refuses stage 3: its decoder is small.
    names = methods or [name for name in METHODS if stage != "3" or name != "evl"]
    for name in names:
        count, bad = misaligned(name, int(stage), ranks, device)
        looked_at += count
        if ranks.is_first:
            print("\n".join(bad), end="\n" if bad else "", flush=True)
    if ranks.is_first:
        print(f"{looked_at} tensors of {len(names)} methods looked at", flush=True)
    return finish(0, ranks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
