"""ViFi-CLIP (CVPR'23): both of CLIP's towers fine-tuned, frame embeddings averaged, nothing added.

The contrastive baseline without a header, under cross entropy over all classes; text is
`classifier.template`, in the official code the bare class name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from kineticlip.config import Config, ContrastiveConfig
from kineticlip.data.batch import VideoViews
from kineticlip.methods.contrastive import ContrastiveCLIP, contrastive_model
from kineticlip.methods.head import cosine_logits, kernels_of, own_loss, view_scores
from kineticlip.methods.method import Method
from kineticlip.methods.text4vis import video_cost
from kineticlip.methods.trunk import embed_views
from kineticlip.models.architectures import Architecture
from kineticlip.models.cost import Part, text, with_training
from kineticlip.runtime.errors import UserError


def build(config: Config, class_names: Sequence[str]) -> ContrastiveCLIP:
    """The model of a configuration."""
    options = config.vificlip
    if not (options.train_text or options.train_visual):
        raise UserError("vificlip: train_text and train_visual are both off: nothing would train")
    settings = replace(
        config,
        text4vis=replace(config.text4vis, header="mean", temporal_module="none", joint=False),
        contrastive=ContrastiveConfig(
            loss="ce",
            text="online" if options.train_text else "frozen",
            train_visual=options.train_visual,
        ),
    )
    return contrastive_model(settings, METHOD.weights(config), class_names)


def score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    """Probabilities [len(videos), C]: the mean over a video's views of their softmax."""
    assert isinstance(model, ContrastiveCLIP)
    scale = model.logit_scale.float().exp()
    logits = partial(cosine_logits, rows=model.class_rows(), scale=scale)
    return view_scores(embed_views(model, videos, chunk), logits, kernels=kernels_of(model))


def param_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """One group with everything that trains; all of it decays, as in the official code."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = config.optim
    return [
        {"name": "clip", "params": trained, "lr": options.lr, "weight_decay": options.weight_decay}
    ]


def cost(config: Config, model: Architecture, classes: int) -> list[Part]:
    """CLIP's towers and nothing else; which of them train is the configuration's choice."""
    options = config.vificlip
    parts = [*video_cost(model, config.data.num_frames), text(model.text, classes)]
    return with_training(
        parts, lambda part: options.train_text if part.once else options.train_visual
    )


METHOD = Method(
    build=build,
    loss=partial(own_loss, method="vificlip"),
    score=score,
    param_groups=param_groups,
    cost=cost,
)
