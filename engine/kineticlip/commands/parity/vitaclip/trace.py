"""What a Vita-CLIP model computes on the way, read with hooks and compared step by step.

Prompt tokens are keys and values only here, so their own outputs, which nothing reads, are the
one thing of the official trace that does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from kineticlip.commands.parity.check import Check
from kineticlip.methods.prompts_vision import BlockPrompts
from kineticlip.methods.vitaclip import VitaCLIP
from kineticlip.models.vision import VisionTransformer

Close = Callable[[str, Tensor, Tensor], Check]


@contextmanager
def record(model: VitaCLIP) -> Iterator[dict[str, Tensor]]:
    """Fills a dictionary with the intermediate values of the forwards inside.

    The last block then runs for every token, as it does under any tap.
    """
    seen: dict[str, Tensor] = {}
    visual = model.visual
    assert isinstance(visual, VisionTransformer)
    handles: list[Any] = []

    def keep(name: str, place: int | None, module: Any, inputs: Any, output: Any) -> None:
        seen[name] = output if place is None else output[place]

    def enter(name: str, module: Any, inputs: Any, output: Any) -> None:
        seen[name] = inputs[0]

    def blockwise(index: int, module: Any, inputs: Any, output: Any) -> None:
        x = inputs[0] if len(inputs) < 2 or inputs[1] is None else inputs[0] + inputs[1]
        seen[f"block{index}.in"] = x
        seen[f"block{index}.out"] = output[0] + output[1]

    for index, block in enumerate(visual.blocks):
        handles.append(block.register_forward_hook(partial(blockwise, index)))
        handles.append(block.attn.register_forward_hook(partial(keep, f"block{index}.attn_out", 0)))
        handles.append(block.ln_2.register_forward_hook(partial(keep, f"block{index}.mlp_in", 0)))
        if model.prompts.groups:
            prompts = cast(BlockPrompts, model.prompts.blocks[index])
            handles.append(
                prompts.cls_proj.register_forward_hook(
                    partial(keep, f"block{index}.cls_proj_out", None)
                )
            )
            handles.append(prompts.register_forward_hook(partial(_sources, seen, index)))
            if prompts.summary:
                handles.append(
                    prompts.summary_attn_layer.register_forward_hook(
                        partial(keep, f"block{index}.summary_attn_out", 0)
                    )
                )
    handles.append(visual.ln_pre.register_forward_hook(partial(enter, "ln_pre_in")))
    handles.append(visual.ln_pre.register_forward_hook(partial(keep, "ln_pre_out", 1)))
    handles.append(visual.ln_post.register_forward_hook(partial(keep, "ln_post_cls", 1)))
    tapped = visual.register_forward_pre_hook(_with_tap, with_kwargs=True)
    try:
        yield seen
    finally:
        for handle in (*handles, tapped):
            handle.remove()


def _with_tap(module: Any, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return inputs, {**options, "tap": lambda *values: None}


def _sources(
    seen: dict[str, Tensor], index: int, module: Any, inputs: Any, output: list[Tensor]
) -> None:
    kinds = [kind for kind in ("local", "summary") if getattr(module, kind)]
    seen.update({f"block{index}.{kind}": rows for kind, rows in zip(kinds, output, strict=True)})


def trace_checks(
    model: VitaCLIP, clips: Tensor, expected: Mapping[str, Tensor], close: Close
) -> Iterator[Check]:
    """Compares the whole trace of clips [B, T, 3, S, S]; names are the recorded ones."""
    text: dict[str, Tensor] = {}
    handles = [
        block.register_forward_hook(
            lambda module, inputs, output, index=index: text.update(
                {f"text.block{index}.out_NLD_first24": output}
            )
        )
        for index, block in enumerate(cast(Any, model.transformer).resblocks)
    ]
    with record(model) as seen:
        seen["video_feature"] = model.encode_clips(clips)
    seen["text_features"] = model.text_features()
    for handle in handles:
        handle.remove()
    seen["logits"] = model(clips)
    learner = model.prompt_learner
    assert learner is not None
    embedded = model.token_embedding(learner.tokens[:, : learner.length])
    text["text_prompts_first24"] = learner(embedded)
    globals_ = model.prompts.global_prompts
    prompts, own = globals_.shape[1], model.prompts.frames
    for name, want in expected.items():
        if name in text:
            found = text[name]
            length = min(found.shape[1], want.shape[1])
            yield close(f"trace {name}", found[:, :length], want[:, :length])
            continue
        block, _, what = name.rpartition(".")
        if what == "attn_seq":
            found = _sequence(seen, block, globals_[int(block.removeprefix("block"))])
        elif what == "attn_out":
            want, found = _without(want, own + prompts, last=1), seen[name]
        elif what in ("in", "out", "mlp_in"):
            want, found = _without(want, prompts), seen[name]
        elif what in ("cls_proj_out", "summary_attn_out"):
            found = seen[name].flatten(0, -2).view_as(want)
        else:
            found = seen[name]
        yield close(f"trace {name}", found, want)


def _without(tokens: Tensor, prompts: int, *, last: int = 0) -> Tensor:
    """Class token and patches of an official sequence [M, 1 + prompts + P + last, D]."""
    return torch.cat([tokens[:, :1], tokens[:, 1 + prompts : tokens.shape[1] - last]], dim=1)


def _sequence(seen: Mapping[str, Tensor], block: str, prompts: Tensor) -> Tensor:
    """The official sequence before a block's norm: class, local, global, patches, summary."""
    x = seen[f"{block}.in"]  # [M, N, D]
    local = seen[f"{block}.local"]  # [M / F, F, D]
    local = local.repeat_interleave(len(x) // len(local), dim=0)
    shared = prompts.expand(len(x), *prompts.shape)
    return torch.cat([x[:, :1], local, shared, x[:, 1:], seen[f"{block}.summary"]], dim=1)
