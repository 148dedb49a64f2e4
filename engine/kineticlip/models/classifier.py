"""The frozen classifier matrix: where its rows come from, and its file.

Shape letters: C classes, E embedding, N videos.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kineticlip.config import Config
from kineticlip.data.labels import read_labels
from kineticlip.models.architectures import architecture
from kineticlip.models.prompts import expand_templates, render
from kineticlip.models.text import text_features
from kineticlip.models.weights import Weights, resolve_weights
from kineticlip.runtime.errors import UserError, did_you_mean
from kineticlip.runtime.files import write_atomic

SUFFIX = ".safetensors"

OpenText = Callable[[], tuple[Weights, str]]  # see `text_weights`


@dataclass(frozen=True)
class Classifier:
    """matrix: float32 [C, E], one row a class of `names`; models normalise the rows themselves.

    provenance: how the rows were made, as plain data. center: [E], what was taken from every row.
    """

    matrix: Tensor
    names: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    center: Tensor | None = None

    def for_names(self, names: Sequence[str], where: str) -> Classifier:
        """The rows of these classes, in this order. UserError for a class it does not have."""
        rows = {name: row for row, name in enumerate(self.names)}
        missing = [name for name in names if name not in rows]
        if missing:
            raise UserError(
                f"{where}: no row for {len(missing)} of {len(names)} classes, "
                f"'{missing[0]}' among them. {did_you_mean(missing[0], rows)}"
            )
        chosen = self.matrix[[rows[name] for name in names]]
        return replace(self, matrix=chosen, names=tuple(names))


def build_classifier(
    config: Config,
    class_names: Sequence[str],
    *,
    weights: Weights | None = None,
    rounded: bool = False,
) -> Classifier:
    """The matrix that `config.classifier` describes, for these classes.

    weights, rounded: see `text_weights`. Where the model was trained with other classes,
    `training_labels` names them: with `center` it is their mean that goes, so that new classes
    move as the trained ones did, and the random sources give the new classes rows of their own,
    behind the trained ones'.
    """
    source = config.classifier.source
    if source.endswith(SUFFIX):
        return load_classifier(source).for_names(class_names, source)
    if source not in SOURCES:
        choices = (*SOURCES, f"a {SUFFIX} file")
        raise UserError(
            f"classifier.source: unknown source '{source}'. {did_you_mean(source, choices)}"
        )
    alone = source == "text" and not config.classifier.center  # no row depends on another class
    labels = "" if alone else config.classifier.training_labels
    trained = read_labels(labels) if labels else tuple(class_names)
    known = set(trained)
    every = (*trained, *(name for name in class_names if name not in known))
    open_text = partial(text_weights, config, weights, rounded=rounded)
    built = SOURCES[source](config, every, open_text)
    if config.classifier.center:
        built = centered(built, trained)
    return built.for_names(class_names, source)


def centered(classifier: Classifier, training_names: Sequence[str]) -> Classifier:
    """Unit rows without the mean of the training classes' unit rows."""
    unit = F.normalize(classifier.matrix, dim=-1)
    training = classifier.for_names(training_names, "classifier.center")
    center = F.normalize(training.matrix, dim=-1).mean(dim=0)  # [E]
    return replace(
        classifier,
        matrix=unit - center,
        center=center,
        provenance={**classifier.provenance, "centered_over": list(training_names)},
    )


def text_weights(
    config: Config, weights: Weights | None = None, *, rounded: bool = False
) -> tuple[Weights, str]:
    """The weights of the text tower, and the config key that names them.

    weights: those of config.model, where the caller has them open already; a text tower of other
    weights is then rounded as they are. rounded: see `Weights`; of what is opened without them.
    """
    own = config.classifier.text_weights
    key = "classifier.text_weights" if own else "model.weights"
    if own or weights is None:
        weights = resolve_weights(
            config.model.arch,
            own or config.model.weights,
            key=key,
            rounded=weights.rounded if weights is not None else rounded,
        )
    return weights, key


def _from_text(config: Config, names: Sequence[str], open_text: OpenText) -> Classifier:
    """CLIP's text features of the prompts. One template: as they come, as Text4Vis keeps them.

    Several: the mean of the unit features, as CLIP's own zero-shot evaluation ensembles them.
    """
    options = config.classifier
    weights, key = open_text()
    templates = expand_templates(options.templates or (options.template,))
    prompts = [prompt for template in templates for prompt in render(template, names)]
    seed = config.seed
    try:
        features = text_features(weights, prompts, seed=seed)  # [templates * C, E]
    except UserError as error:
        raise UserError(f"{key}: {weights.source}: {error}") from None
    features = features.unflatten(0, (len(templates), len(names)))  # [templates, C, E]
    matrix = features[0] if len(templates) == 1 else F.normalize(features, dim=-1).mean(dim=0)
    provenance = {
        "source": "text",
        "arch": weights.model.name,
        "weights": weights.source,
        "sha256": weights.fingerprint if weights.path is not None else None,
        "seed": None if weights.path is not None else seed,
        "templates": list(templates),
    }
    return Classifier(matrix, tuple(names), provenance)


def _random_normal(config: Config, names: Sequence[str], open_text: OpenText) -> Classifier:
    """Rows of independent N(0, 1): the random classifier of the Text4Vis ablation."""
    del open_text
    embed, seed = architecture(config.model.arch).embed, config.classifier.seed
    matrix = np.random.default_rng(seed).standard_normal((len(names), embed))
    provenance = {"source": "random_normal", "seed": seed}
    return Classifier(torch.from_numpy(matrix).float(), tuple(names), provenance)


def _random_orthogonal(config: Config, names: Sequence[str], open_text: OpenText) -> Classifier:
    """The first C rows of Q of a square normal matrix: the other random one of the ablation."""
    del open_text
    embed, seed = architecture(config.model.arch).embed, config.classifier.seed
    if len(names) > embed:
        raise UserError(
            f"classifier.source: {len(names)} orthogonal rows do not fit in {embed} dimensions; "
            "use random_normal"
        )
    matrix = orthogonal_matrix(embed, seed)[: len(names)]
    provenance = {"source": "random_orthogonal", "seed": seed}
    return Classifier(torch.from_numpy(matrix).float(), tuple(names), provenance)


# classifier.source -> the rows of these classes; the text tower is opened by those that need it
SOURCES: dict[str, Callable[[Config, Sequence[str], OpenText], Classifier]] = {
    "text": _from_text,
    "random_normal": _random_normal,
    "random_orthogonal": _random_orthogonal,
}


def orthogonal_matrix(width: int, seed: int) -> NDArray[np.float64]:
    """A seeded random orthogonal matrix [width, width]."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))
    return np.asarray(q)


def lda_classifier(
    embeddings: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    names: Sequence[str],
    *,
    shrinkage: float | Literal["auto"] = "auto",
) -> Classifier:
    """Rows that linear discriminant analysis finds in video embeddings.

    embeddings [N, E], labels [N] into names. Text4Vis says only "LDA coefficient" of 60 videos a
    class; this is scikit-learn's `lsqr` solution, class means times the inverse of the shrunk
    within-class covariance, no intercept. "auto" is the Ledoit-Wolf shrinkage. The common mean of
    the rows changes no decision of the discriminant but does change cosines; it stays.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    counts = np.bincount(labels, minlength=len(names))
    if len(counts) > len(names):
        raise UserError(f"LDA: label {labels.max()} of {len(names)} classes")
    if (counts == 0).any():
        raise UserError(f"LDA: no video of class '{names[int(counts.argmin())]}'")
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, store_covariance=True)
    model.fit(embeddings.astype(np.float64), labels)
    # `coef_` itself for three classes or more; for two, scikit-learn keeps only the difference.
    rows, *_ = np.linalg.lstsq(model.covariance_, model.means_.T, rcond=None)
    provenance = {
        "source": "lda",
        "solver": "lsqr",
        "shrinkage": shrinkage,
        "videos": len(labels),
        "fewest_videos_of_a_class": int(counts.min()),
    }
    return Classifier(torch.from_numpy(rows.T.copy()).float(), tuple(names), provenance)


def project(
    matrix: Tensor, embed: int, *, how: Literal["orthogonal", "pca"], seed: int = 0
) -> Tensor:
    """Rows of another width brought to E: [C, W] -> [C, E].

    orthogonal: a seeded random isometry (W <= E: every angle is kept) or random projection
    (W > E). pca: the E leading principal directions of the rows, which needs E < C and E <= W.
    """
    width = matrix.shape[1]
    if width == embed:
        return matrix
    if how == "orthogonal":
        basis = orthogonal_matrix(max(width, embed), seed)[:width, :embed]
        rotated: Tensor = matrix @ torch.from_numpy(basis).to(matrix.dtype)
        return rotated
    if embed >= len(matrix) or embed > width:
        raise UserError(
            f"PCA of {len(matrix)} rows of width {width} has no {embed} directions; "
            "use the orthogonal projection"
        )
    offset = matrix - matrix.mean(dim=0)
    _, _, directions = torch.linalg.svd(offset.double(), full_matrices=False)  # [.., W]
    projected: Tensor = offset @ directions[:embed].T.to(matrix.dtype)
    return projected


def sentence_classifier(
    folder: str | Path,
    names: Sequence[str],
    embed: int,
    *,
    template: str = "{}",
    pooling: Literal["mean", "first"] = "mean",
    projection: Literal["orthogonal", "pca"] = "orthogonal",
    seed: int = 0,
) -> Classifier:
    """Rows from a language model of the transformers library (DistilBERT, sentence encoders).

    folder: model and tokenizer as `save_pretrained` writes them; nothing is fetched. pooling: the
    mean over the tokens of a text, or its first token. Where the model is not E wide its rows go
    through `project`. Text4Vis publishes neither its pooling nor its projection.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise UserError("a sentence classifier needs the transformers package") from None
    if not Path(folder, "config.json").is_file():
        raise UserError(f"{folder}: no model folder (no config.json in it)")
    try:
        encode = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval().float()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {str(error).strip().splitlines()[0]}") from None
    rows = []
    with torch.inference_mode():
        for start in range(0, len(names), 64):
            texts = render(template, names[start : start + 64])
            inputs = encode(texts, padding=True, truncation=True, return_tensors="pt")
            tokens = model(**inputs).last_hidden_state  # [c, n, W]
            if pooling == "first":
                rows.append(tokens[:, 0])
            else:
                mask = inputs["attention_mask"].unsqueeze(-1)
                rows.append((tokens * mask).sum(dim=1) / mask.sum(dim=1))
    matrix = torch.cat(rows).clone()  # [C, W], out of inference mode
    provenance = {
        "source": "sentence",
        "model": str(folder),
        "template": template,
        "pooling": pooling,
        "width": matrix.shape[1],
        "projection": None if matrix.shape[1] == embed else projection,
        "seed": seed,
    }
    matrix = project(matrix, embed, how=projection, seed=seed)
    return Classifier(matrix, tuple(names), provenance)


def save_classifier(classifier: Classifier, path: str | Path) -> None:
    """Writes the file whole or not at all: tensors `classifier` and `center`, the rest as JSON."""
    tensors = {"classifier": classifier.matrix.float().contiguous()}
    if classifier.center is not None:
        tensors["center"] = classifier.center.float().contiguous()
    metadata = {
        "names": json.dumps(list(classifier.names)),
        "provenance": json.dumps(classifier.provenance),
    }
    write_atomic(path, save(tensors, metadata))


def load_classifier(path: str | Path) -> Classifier:
    """Reads what `save_classifier` wrote; UserError for anything else."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such classifier file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a classifier file: {error}") from None
    matrix = tensors.get("classifier")
    names = json.loads(metadata.get("names", "[]"))
    if matrix is None or matrix.ndim != 2 or len(names) != len(matrix):
        raise UserError(f"{path}: not a classifier file: no matrix with a name for each row")
    provenance = json.loads(metadata.get("provenance", "{}"))
    return Classifier(matrix, tuple(names), provenance, tensors.get("center"))
