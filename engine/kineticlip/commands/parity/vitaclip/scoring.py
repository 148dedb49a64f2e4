"""Vita-CLIP scoring: tokens, prompts, towers, every step of the model, zero-shot scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kineticlip.commands.parity.check import Check, exactly
from kineticlip.commands.parity.vitaclip.golden import Golden, clips_of, close, load, read_json
from kineticlip.commands.parity.vitaclip.trace import record, trace_checks
from kineticlip.commands.parity.vitaclip.training import official
from kineticlip.config import ClassifierConfig, Config, DataConfig
from kineticlip.data.batch import VideoViews
from kineticlip.data.labels import read_labels
from kineticlip.formats import TARGETS
from kineticlip.formats.table import apply_rules
from kineticlip.methods.prompts_text import Placeholders, clean
from kineticlip.methods.vitaclip import METHOD, VitaCLIP, vita_model
from kineticlip.models.architectures import architecture
from kineticlip.models.classifier import Classifier, save_classifier
from kineticlip.models.text import encode_text, tokenize
from kineticlip.models.weights import Weights
from kineticlip.runtime.errors import UserError


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
        scores = METHOD.score(model, [views], frames)[0]
    yield close("zero-shot view mean", scores, expected["view_mean_scores"])
    for name in ("top1", "top5"):
        want = expected[name]
        yield exactly(f"zero-shot {name}", scores.topk(len(want)).indices, want)
