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
from kineticlip.methods import contrastive
from kineticlip.methods.contrastive import ContrastiveCLIP
from kineticlip.methods.head import cosine_logits, kernels_of, own_loss, view_scores
from kineticlip.methods.method import Method
from kineticlip.methods.trunk import embed_views
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
    return contrastive.build(settings, class_names)


def score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    """Probabilities [len(videos), C]: the mean over a video's views of their softmax."""
    assert isinstance(model, ContrastiveCLIP)
    views = embed_views(model.visual, None, videos, chunk, per_clip=False)
    scale = model.logit_scale.float().exp()
    logits = partial(cosine_logits, rows=model.class_rows(), scale=scale)
    return view_scores(views, logits, kernels=kernels_of(model))


def param_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """One group with everything that trains; all of it decays, as in the official code."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = config.optim
    return [
        {"name": "clip", "params": trained, "lr": options.lr, "weight_decay": options.weight_decay}
    ]


VIFICLIP = Method(
    build=build, loss=partial(own_loss, method="vificlip"), score=score, param_groups=param_groups
)
