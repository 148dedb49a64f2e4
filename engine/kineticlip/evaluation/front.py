"""What Python programs call: a recogniser by name or file, and its accuracy on a list of videos."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kineticlip.config import Config, EvalPrecision, load_config, override, recipes
from kineticlip.data.labels import read_labels
from kineticlip.evaluation.recognizer import (
    Recognizer,
    config_of,
    load_recognizer,
    pick_device,
    plain_clip,
    scoring_others,
    with_weights,
)
from kineticlip.evaluation.run import ListOptions, evaluate_list
from kineticlip.models.architectures import architecture, known
from kineticlip.runtime.errors import UserError, did_you_mean

YAML = (".yaml", ".yml")


def load(
    source: str | Path,
    *,
    weights: str | Path = "",
    labels: str | Path | Sequence[str] = (),
    device: str | torch.device | None = None,
    precision: EvalPrecision | None = None,
    overrides: Sequence[str] = (),
) -> Recognizer:
    """A recogniser ready to score videos.

    source: one of

    - a weights file: what `kineticlip train` wrote, which carries its configuration and class
      names, or CLIP's own as it was published;
    - a recipe by name (`k400-text4vis-vitb16-f8`), or a YAML file, official ones included;
    - a CLIP model of open_clip, `ViT-B-16`, with a tag of its weights if not OpenAI's:
      `ViT-B-16/laion2b_s34b_b88k`. `ViT-B-16/random` is untrained. Frame embeddings are averaged.

    weights: a checkpoint of any known format, an open_clip tag, `hf-hub:owner/name` or `random`,
    in place of those that source names. labels: the class names; or a label file, or a built-in
    set such as `kinetics-400`; by default those of source. device: by default the first GPU, else
    the CPU. precision: fp32, bf16, fp16, int8 (CPU) or fp8 (GPU); by default that of source.
    overrides: further changes of the configuration, `test.clips=4`, as with --set.

    Raises UserError for a source, label, device or value that is unknown, where weights are
    neither here nor to be fetched, and where a part that has to be trained has no weights.
    """
    config, weights = _configuration(str(source), str(weights))
    chosen = [f"eval.precision={precision}"] if precision else []
    config = override(config, [*overrides, *chosen])
    names = () if isinstance(labels, str | Path) else _checked(labels)
    file = str(labels) if isinstance(labels, str | Path) else ""
    if weights:
        config = with_weights(config, weights, file)
    elif file:
        config = replace(config, data=replace(config.data, labels=file))
    if names:
        config = scoring_others(config)
    elif config.data.labels:
        names = read_labels(config.data.labels)
    else:
        raise UserError(f"{source}: no class names: give labels=['first', 'second'] or a file")
    return load_recognizer(config, names, device=_device(device))


def evaluate(
    model: Recognizer | Config,
    videos: str | Path = "",
    *,
    root: str | Path = "",
    out: str | Path | None = None,
    metrics: Sequence[str] = (),
    limit: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The accuracy on a list of videos: what `kineticlip eval` writes into summary.json.

    model: a recogniser, whose views, precision and classes are kept; or a configuration, which
    names its own weights and labels. videos: a list file with lines `path label`, below the folder
    root; by default the list of the configuration, data.val_list. metrics: further numbers, of
    zero-shot, map, multilabel and official-padded, under `extra`. limit: only the first videos.

    out: a folder for the result of every video, which an interrupted evaluation continues and
    `kineticlip report` reads; None keeps nothing.

    Among the keys of what is returned: top1, top5 and mean_class_accuracy in percent (None where
    no video has exactly one label), top1_interval of 95 %, scored, classes, bad (videos that could
    not be decoded, which count nowhere) with bad_videos and bad_reasons, and speed.

    Raises UserError for a list that cannot be read, has labels beyond the classes or no video, for
    an unknown metric, and where out belongs to another evaluation.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit should be at least 1, got {limit}")
    recognizer = model if isinstance(model, Recognizer) else None
    config = model.config if isinstance(model, Recognizer) else model
    if videos:
        data = replace(config.data, val_list=str(videos), val_root=str(root))
        config = replace(config, data=data)
    if recognizer is not None:
        recognizer = replace(recognizer, config=config)
    options = ListOptions(limit=limit, metrics=metrics, quiet=not progress)
    with ExitStack() as stack:
        if out is None:
            out = stack.enter_context(tempfile.TemporaryDirectory())
        return evaluate_list(config, Path(out), options, recognizer=recognizer)


def _configuration(source: str, weights: str) -> tuple[Config, str]:
    """(the configuration, the weights to put in place of its own or "")."""
    path = Path(source)
    if source in recipes() or path.suffix in YAML:
        return load_config(source), weights
    if path.is_file():
        return config_of(source), weights or source
    arch, _, tag = source.rpartition("/")
    if arch and _is_clip(arch):
        return plain_clip(arch), weights or tag
    if _is_clip(source):
        return plain_clip(source), weights
    hint = did_you_mean(arch or source, [*recipes(), *known()])
    raise UserError(f"{source}: no file, recipe or CLIP model of that name. {hint}")


def _is_clip(name: str) -> bool:
    try:
        architecture(name)
    except UserError:
        return False
    return True


def _checked(labels: Sequence[str]) -> tuple[str, ...]:
    names = tuple(labels)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"labels: class '{twice}' is listed twice")
    return names


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return pick_device()
    try:
        found = torch.device(device)
    except RuntimeError:  # no such word
        raise UserError(f"device: should be cpu, cuda or cuda:N, got '{device}'") from None
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"device: should be cpu, cuda or cuda:N, got '{device}'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: PyTorch sees {torch.cuda.device_count()} GPUs, got '{device}'")
    return found
