"""A Vita-CLIP directory of other sizes, made from the formulas written down, passes the replay.

Nothing in it is square or a power of two: 32x48 pixels, 3 frames, width 40 in 5 heads, 4 classes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from kineticlip.commands.parity.check import Check
from kineticlip.commands.parity.vitaclip import scoring, training
from kineticlip.commands.parity.vitaclip.golden import Golden, clips_of
from kineticlip.formats.table import apply_rules
from kineticlip.formats.targets import TARGETS
from kineticlip.methods.vitaclip import VitaCLIP, vita_model
from kineticlip.models.architectures import VisionShape
from kineticlip.models.weights import Weights

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from methods_vitaclip import plain_clips, plain_text

Part = Callable[[Golden], Iterator[Check]]

NAMES = ["abseiling", "brush_hair", "tai chi", "playing didgeridoo"]
CFG = {
    "input_size": [32, 48], "patch_size": [16, 16], "num_frames": 3, "feature_dim": 40,
    "num_heads": 5, "num_layers": 2, "mlp_factor": 1.5, "embed_dim": 24, "num_global_prompts": 2,
    "text_context_length": 77, "text_vocab_size": 49408, "text_transformer_width": 16,
    "text_transformer_heads": 2, "text_transformer_layers": 1, "text_num_prompts": 2,
}  # fmt: skip


def tokens() -> tuple[Tensor, dict[str, Any]]:
    sentences = [f"X X {name.replace('_', ' ')}." for name in NAMES]
    rows = open_clip.tokenize(sentences)
    tokenizer = open_clip.SimpleTokenizer()
    lengths = [len(tokenizer.encode(name.replace("_", " "))) for name in NAMES]
    record = {"tokenized_prompts": rows.tolist(), "eot": rows.argmax(-1).tolist()}
    return rows, {"csc_end": {**record, "name_lens": lengths, "n_ctx": 2, "pos": "end"}}


def official(model: VitaCLIP) -> dict[str, Tensor]:
    target = TARGETS["vitaclip"]
    prepared = target.prepare(model.state_dict(), {})
    names = apply_rules(prepared, target.rename, "the model", "format vitaclip")
    return {new: prepared[name].contiguous().clone() for name, new in names.items() if new}


def plain_step(model: Any, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(features, logits, loss) by the straightforward formulas."""
    features = plain_clips(model.visual, model.prompts, clips)
    text = F.normalize(plain_text(model), dim=-1)
    logits = model.logit_scale.exp() * F.normalize(features, dim=-1) @ text.T
    return features, logits, F.cross_entropy(logits, labels)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    folder = tmp_path_factory.mktemp("golden")
    rows, variants = tokens()
    config = {"cfg": CFG, "classes": NAMES, "init_text": "a", "lr": 4e-4, "weight_decay": 0.05}
    (folder / "tokens.json").write_text(json.dumps(variants))
    stored = torch.randint(-60, 60, (3, 3, 3, 32, 48), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([1, 0, 3])
    save_file(
        {"x_int8_div32": stored.to(torch.int8), "labels": labels}, folder / "inputs.safetensors"
    )
    blank = Golden(
        folder=folder, scratch=folder, config=config, variants=variants, weights={},
        clips=clips_of(stored.to(torch.int8)), labels=labels,
    )  # fmt: skip
    shape = blank.architecture
    assert isinstance(shape.vision, VisionShape)
    assert (shape.vision.resolution, shape.vision.height) == (48, 32)
    model = vita_model(blank.settings(), Weights(shape, "random", None), NAMES)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    config["trainable"] = sorted(
        training.official({n: p for n, p in model.named_parameters() if p.requires_grad})
    )
    (folder / "config.json").write_text(json.dumps(config))
    weights = official(model)
    embedding = weights.pop("textual.token_embedding.weight")
    ids = rows.unique()
    weights |= {"__token_embedding_ids": ids, "__token_embedding_rows": embedding[ids]}
    save_file(weights, folder / "weights.safetensors")
    features, logits, loss = plain_step(model.train(), blank.clips, labels)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    grads = {f"csc_end.split1.grad.{n}": g.clone() for n, g in training.official(found).items()}
    save_file({**grads, "csc_end.split1.loss": loss.detach()}, folder / "grads.safetensors")
    assert model.prompt_learner is not None
    context = model.prompt_learner.ctx.detach().clone()
    outputs = {"video_feature": features[:2], "logits": logits[:2]}
    save_file(
        {f"s1l1g1.{name}": tensor.detach().clone() for name, tensor in outputs.items()},
        folder / "vision_variants.safetensors",
    )
    text = {"ctx": context, "text_features": plain_text(model), "logits": logits[:2]}
    save_file(
        {f"csc_end.{name}": tensor.detach().clone() for name, tensor in text.items()},
        folder / "text_variants.safetensors",
    )
    scratch = tmp_path_factory.mktemp("scratch")
    return Golden.read(folder, scratch)


@pytest.mark.parametrize(
    "part",
    [scoring.tokens, scoring.text_variants, scoring.vision_variants, training.gradients],
)
def test_other_sizes_pass(made: Golden, part: Part) -> None:
    found = list(part(made))
    assert len(found) >= 2
    assert [f"{c.name}: {c.error:.1e} {c.detail}" for c in found if not c.passed] == []


def test_and_the_replay_can_fail(made: Golden) -> None:
    rolled = made.weights["visual.pos_embed"].roll(1, dims=0)
    wrong = Golden(**{**vars(made), "weights": {**made.weights, "visual.pos_embed": rolled}})
    assert not all(check.passed for check in scoring.vision_variants(wrong))
