"""The DeepSpeed engine around a model: starting it, its updates, its weights in full precision."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kineticlip.config import Config, TrainConfig
from kineticlip.runtime.distributed import Ranks
from kineticlip.training.deepspeed_config import deepspeed_settings, scalars_apart
from kineticlip.training.job import Job
from kineticlip.training.optim import build_optimizer

ALIGNED = 8  # elements of 16 bits in 16 bytes, where wide loads and cuBLAS want a tensor to begin


@dataclass(frozen=True, kw_only=True)
class Started:
    """A running engine, the learning rates of its groups before the schedule, and its weights.

    shown: which of the rates are those of the method's own groups. aligned: see `start`.
    """

    engine: Any
    rates: list[float]
    shown: list[int]
    weights: FullPrecision
    aligned: bool


def start(job: Job, *, aligned: bool = True) -> Started:
    """Groups the parameters, builds the optimiser and hands both to DeepSpeed.

    aligned: lay them out for 16-byte addresses; False for the layout of older checkpoints.
    """
    config, model = job.config, job.model
    groups = job.method.param_groups(model, config)
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    strays = [n for n, p in model.named_parameters() if p.requires_grad != (id(p) in grouped)]
    assert not strays, f"trained but in no group, or frozen and in one: {strays[:3]}"
    shown = list(range(len(groups)))
    if aligned and config.train.zero_stage > 0:
        groups, shown = aligned_groups(groups, stage=config.train.zero_stage)
    optimizer = build_optimizer(groups, config.optim, fused=job.device.type == "cuda")
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    weights = FullPrecision.of(model, config, kept=job.ranks.is_first)
    originals = job.method.before_training(model, config)
    weights.frozen.update(originals if job.ranks.is_first else {})
    engine = start_engine(config, model, optimizer, ranks=job.ranks, device=job.device)
    return Started(engine=engine, rates=rates, shown=shown, weights=weights, aligned=aligned)


def aligned_groups(
    groups: Sequence[Mapping[str, Any]], *, stage: int
) -> tuple[list[dict[str, Any]], list[int]]:
    """Optimiser groups whose tensors lie on 16-byte addresses once ZeRO has flattened them.

    ZeRO lays the parameters of a group end to end without padding, so one of a single element (a
    logit scale) would push all that follow to 2-byte addresses. Those of a multiple of 8 elements
    go first; of the others one may end a group (stages 1 and 2 give each group a buffer of its
    own), and each of the rest is a group with the same options. Stage 3 has one buffer for all, so
    they go behind the last group, the largest first. Gives the groups, and the place among them
    of each group given.
    """
    first: list[dict[str, Any]] = []
    odd: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        params = sorted(group["params"], key=lambda p: p.numel() % ALIGNED != 0)
        split = sum(p.numel() % ALIGNED == 0 for p in params)
        if stage < 3:
            split = min(split + 1, len(params))
        if split:
            first.append({**group, "params": params[:split], "declared": number})
        odd += [{**group, "params": [p], "declared": number} for p in params[split:]]
    odd.sort(key=lambda group: -group["params"][0].numel())
    laid = first + odd
    declared = [group.pop("declared") for group in laid]
    return laid, [declared.index(number) for number in range(len(groups))]


def start_engine(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    ranks: Ranks,
    device: torch.device,
) -> Any:
    """A DeepSpeed engine around the model; it moves and casts the model's parameters in place."""
    import deepspeed

    settings = deepspeed_settings(config, world_size=ranks.world_size, cuda=device.type == "cuda")
    model.to(device)
    with (
        scalars_apart(model, stage=config.train.zero_stage),
        contextlib.redirect_stdout(io.StringIO()),  # its bf16 optimiser prints memory tables
    ):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
    return engine


def update(engine: Any, train: TrainConfig) -> tuple[bool, float | Tensor]:
    """The optimiser's step: whether it was taken, and the norm of its gradient.

    A step with non-finite gradients is left out. ZeRO does that by itself; at stage 0
    DeepSpeed would write them into the weights, and cannot clip those without dimensions.
    """
    if train.zero_stage == 0:
        graded = [p for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in graded])
        if not torch.isfinite(norm):
            engine.zero_grad()
            return False, norm
        if train.gradient_clipping:
            torch.nn.utils.clip_grads_with_norm_(graded, train.gradient_clipping, norm)
        engine.step()
        return True, norm
    skipped = engine.skipped_steps
    engine.step()
    norm = engine.get_global_grad_norm()
    return engine.skipped_steps == skipped, math.nan if norm is None else norm


@contextlib.contextmanager
def whole(module: nn.Module, train: TrainConfig) -> Iterator[None]:
    """At stage 3 gathers every parameter for as long as the context lasts."""
    if train.zero_stage < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


@dataclass(frozen=True, kw_only=True)
class FullPrecision:
    """The state dict of a model that an engine holds in parts, or rounded.

    shapes: of the state dict before the engine took the model over. frozen: the frozen
    parameters as they were built, on the first rank, where the engine rounds or divides them.
    """

    shared_out: bool
    shapes: dict[str, torch.Size]
    frozen: dict[str, Tensor]
    kept: bool

    @classmethod
    def of(cls, model: nn.Module, config: Config, *, kept: bool) -> FullPrecision:
        """To be called before the engine starts. kept: whether this rank keeps the weights."""
        shared_out = config.train.zero_stage == 3 or config.train.precision != "fp32"
        frozen = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if shared_out and kept and not parameter.requires_grad
        }
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return cls(shared_out=shared_out, shapes=shapes, frozen=frozen, kept=kept)

    def state(self, engine: Any) -> dict[str, Tensor]:
        """The state dict in float32 on the first rank, {} on others; every rank calls it.

        Trained parameters come from the optimiser's own copies, frozen ones as they were built:
        the engine rounds those it runs.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        state: dict[str, Tensor] = {}
        for name, value in engine.module.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):
                if self.shared_out and value.requires_grad:
                    value = safe_get_full_fp32_param(value)
                value = self.frozen.get(name, value)
            if self.kept:
                state[name] = value.detach().cpu().reshape(self.shapes[name])
        return state
