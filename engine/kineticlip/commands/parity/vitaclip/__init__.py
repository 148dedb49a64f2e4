"""Outputs of the official Vita-CLIP code, replayed: see the README beside them for the grammar.

Shape letters: B clips, T frames, F frames of the model, N tokens, G global prompts, D width.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from kineticlip.commands.parity.check import Check, compare, exactly
from kineticlip.commands.parity.vitaclip.data import data_checks
from kineticlip.commands.parity.vitaclip.trace import record, trace_checks
from kineticlip.config import ClassifierConfig, Config, DataConfig, OptimConfig, VitaConfig
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.data.labels import read_labels
from kineticlip.formats import TARGETS
from kineticlip.formats.names import split_projections
from kineticlip.formats.table import apply_rules
from kineticlip.methods.prompts_text import Placeholders, clean
from kineticlip.methods.vitaclip import VITACLIP, VitaCLIP, vita_model
from kineticlip.models.architectures import Architecture, TextShape, VisionShape, architecture
from kineticlip.models.classifier import Classifier, save_classifier
from kineticlip.models.text import encode_text, tokenize
from kineticlip.models.weights import Weights
from kineticlip.runtime.errors import UserError
from kineticlip.training.optim import build_optimizer, rate_factor

RTOL = 2e-5  # of a file's largest magnitude: another order of fp32 sums
GRADIENT = 1e-4  # of a gradient's largest magnitude
STEPPED = 2e-5  # absolute, of parameters after a few steps of AdamW
LOSS = 2e-5
ROUNDING_ONLY = "summary_attn_layer.k_proj.bias"  # its gradient is zero but for rounding
ALL = "s1l1g1"
PLACES = {"summary": 1, "local": 3, "global": 5}  # where such a word says which prompts are on


def checks(folder: Path) -> Iterator[Check]:
    """Every comparison of one directory."""
    with tempfile.TemporaryDirectory() as scratch:
        golden = Golden.read(folder, Path(scratch))
        for part in (
            tokens,
            text_variants,
            vision_variants,
            trace,
            frame_mismatch,
            zero_shot,
            gradients,
            three_steps,
            main_run,
        ):
            yield from part(golden)
    yield from data_checks(folder)
    if (folder / "vitb16_keys.json").is_file():
        yield from published_layout(folder)


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


def published_layout(folder: Path) -> Iterator[Check]:
    """Names, shapes and freezing of the published ViT-B/16 configuration."""
    entries = read_json(folder / "vitb16_keys.json")
    config = Config(method="vitaclip", data=DataConfig(num_frames=8, resolution=224))
    weights = Weights(architecture("ViT-B-16"), "random", None)
    model = vita_model(config, weights, read_labels("kinetics-400"))
    target = TARGETS["vitaclip"]
    prepared = target.prepare(model.state_dict(), {})
    renamed = apply_rules(prepared, target.rename, "the model", "format vitaclip")
    found = {new: list(prepared[name].shape) for name, new in renamed.items() if new is not None}
    yield exactly("layout ViT-B/16", found, {e["key"]: e["shape"] for e in entries})
    trained = official({n: p for n, p in model.named_parameters() if p.requires_grad})
    want = sorted(entry["key"] for entry in entries if entry["trainable"])
    yield exactly("layout ViT-B/16 trained", sorted(trained), want)


def tokens(golden: Golden) -> Iterator[Check]:
    """Token rows, name lengths and context shapes of every text variant."""
    for variant, record_ in golden.variants.items():
        if variant == "class_only":
            rows = tokenize([clean(name) for name in golden.names])
            yield exactly(f"tokens {variant}", rows.tolist(), record_["tokenized_prompts"])
            continue
        options = golden.settings(variant).vitaclip
        rows_ = Placeholders.of(golden.names, context=options.context, words=options.context_words)
        yield exactly(f"tokens {variant}", rows_.tokens.tolist(), record_["tokenized_prompts"])
        yield exactly(f"tokens {variant} ends", rows_.tokens.argmax(-1).tolist(), record_["eot"])
        yield exactly(f"tokens {variant} names", list(rows_.lengths), record_["name_lens"])
        yield exactly(f"tokens {variant} context", rows_.context, record_["n_ctx"])


def text_variants(golden: Golden) -> Iterator[Check]:
    """Prompts, text features and logits of every way to place and share the context."""
    expected = load(golden.folder / "text_variants")
    for variant in golden.variants:
        if variant == "class_only":
            continue
        context = expected[f"{variant}.ctx"]
        if variant.startswith("init_"):
            fresh = golden.model(variant, trained_context=False)
            yield close(f"text {variant} initial context", _learner(fresh).ctx, context)
        model = golden.model(variant, context=context).eval()
        learner = _learner(model)
        with torch.inference_mode():
            yield close(
                f"text {variant} features",
                model.text_features(),
                expected[f"{variant}.text_features"],
            )
            yield close(
                f"text {variant} logits", model(golden.clips[:2]), expected[f"{variant}.logits"]
            )
            prompts = expected.get(f"{variant}.prompts")
            if prompts is not None:
                length = min(learner.length, prompts.shape[1])
                embedded = model.token_embedding(learner.tokens[:, : learner.length])
                yield close(
                    f"text {variant} prompts", learner(embedded)[:, :length], prompts[:, :length]
                )


def _learner(model: VitaCLIP) -> Any:
    assert model.prompt_learner is not None
    return model.prompt_learner


def vision_variants(golden: Golden) -> Iterator[Check]:
    """Each combination of prompts: class tokens behind every block, features, logits."""
    expected = load(golden.folder / "vision_variants")
    for flags in sorted({name.split(".")[0] for name in expected}):
        model = golden.model(flags=flags).eval()
        with torch.inference_mode(), record(model) as seen:
            features = model.encode_clips(golden.clips[:2])
        with torch.inference_mode():
            seen["video_feature"], seen["logits"] = features, model(golden.clips[:2])
            whole = {name: rows for name, rows in seen.items() if name.endswith(".out")}
            seen |= {name.replace(".out", ".cls_out"): rows[:, 0] for name, rows in whole.items()}
        for name, want in expected.items():
            prefix, _, what = name.partition(".")
            if prefix == flags:
                yield close(f"vision {name}", seen[what], want)


def trace(golden: Golden) -> Iterator[Check]:
    """Every step of the whole model."""
    expected = load(golden.folder / "trace_all")
    model = golden.model().eval()
    with torch.inference_mode():
        yield from trace_checks(model, golden.clips[:2], expected, close)


def frame_mismatch(golden: Golden) -> Iterator[Check]:
    """Chunks of F frames where T is a multiple; refused where videos would share a group."""
    expected = load(golden.folder / "frame_mismatch")
    made_for = golden.config["cfg"]["num_frames"]
    for name, want in expected.items():
        case, flags = name.split(".")[:2]
        if flags == "x_int8_div32":
            continue
        clips = clips_of(expected[f"{case}.x_int8_div32"])
        frames = clips.shape[1]
        refuses = frames % made_for != 0 and flags[:4] != "s0l0"
        model = golden.model(flags=flags).eval()
        with torch.inference_mode():
            if not refuses:
                yield close(f"frames {case} {flags}", model.encode_clips(clips), want)
            else:
                run = _refuses(partial(model.encode_clips, clips))
                made = _refuses(partial(golden.model, flags=flags, frames=frames))
                refused = [run, made]
                yield exactly(f"frames {case} {flags} refused", refused, [True, True])


def _refuses(run: Callable[[], object]) -> bool:
    try:
        run()
    except UserError:
        return True
    return False


def zero_shot(golden: Golden) -> Iterator[Check]:
    """Bare class names through the frozen text tower; scores averaged over views."""
    expected = load(golden.folder / "zeroshot")
    text = golden.model().eval()
    with torch.inference_mode():
        found = encode_text(text, tokenize([clean(name) for name in golden.names]))
    yield close("zero-shot text features", found, expected["text_features"])
    path = golden.scratch / "classes.safetensors"
    save_classifier(Classifier(expected["text_features"], golden.names), path)
    model = golden.model(
        vita={"text": "classifier"}, classifier=ClassifierConfig(source=str(path))
    ).eval()
    clips, frames = golden.clips, golden.clips.shape[1]
    views = VideoViews(
        name="golden",
        label=0,
        images=clips.flatten(0, 1).unsqueeze(1),
        frame_index=torch.arange(len(clips) * frames).unflatten(0, (-1, frames)),
        crop_index=torch.zeros(1, dtype=torch.long),
        decoder="none",
        num_frames=len(clips) * frames,
    )
    with torch.inference_mode():
        yield close("zero-shot features", model.encode_clips(clips), expected["video_feature"])
        yield close("zero-shot logits", model(clips), expected["logits"])
        scores = VITACLIP.score(model, [views], frames)[0]
    yield close("zero-shot view mean", scores, expected["view_mean_scores"])
    for name in ("top1", "top5"):
        want = expected[name]
        yield exactly(f"zero-shot {name}", scores.topk(len(want)).indices, want)


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
            loss, _ = VITACLIP.loss(self, batch)
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
    return model, build_optimizer(VITACLIP.param_groups(model, config), config.optim), config


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
