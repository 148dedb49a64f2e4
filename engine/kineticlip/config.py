"""The whole configuration of a run: frozen dataclasses, read from one YAML file and `--set` pairs.

Every default lives here. Unknown keys and wrong values are `UserError`s that name file and line.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from kineticlip.errors import UserError, did_you_mean
from kineticlip.official import is_official, translate

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
# int8 on a CPU and fp8 on a GPU are of the tower's products; everything else is bf16 then.
EvalPrecision = Literal["fp32", "bf16", "fp16", "int8", "fp8"]
EIGHT_BITS = ("int8", "fp8")
Compile = Literal["auto", "always", "never"]  # YAML reads on and off as booleans
CLIP_LOAD = ("text4vis", "contrastive", "bike", "actionclip")  # official codes with one clip.load


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The CLIP tower and where its weights come from."""

    arch: str = "ViT-B-16"  # a name of kineticlip.architectures, or of open_clip
    weights: str = "openai"  # open_clip tag, hf-hub:..., a file, or "random"
    # official: a CLIP file's products go through fp16, as in the official clip.load (Text4Vis and
    # its kin); OpenAI's own files hold fp16 already, fine-tuned checkpoints are never rounded
    rounding: Literal["official", "none"] = "official"
    kernels: Literal["auto", "reference", "triton"] = "auto"
    attention: Literal["auto", "reference", "sdpa", "xformers", "triton"] = "auto"


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Where the frozen classifier matrix [C, E] comes from."""

    source: str = "text"  # text, random_normal, random_orthogonal, or a .safetensors file
    template: str = "a video of a person {}."
    templates: tuple[str, ...] = ()  # several: the mean of their unit features; replaces template
    text_weights: str = ""  # empty: the text tower of model.weights
    center: bool = False  # remove the mean of the training classes' features
    training_labels: str = ""  # those classes, where others are scored (zero-shot)
    seed: int = 0  # of the two random sources


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Lists, labels, decoding and training-time sampling."""

    train_list: str = ""  # lines `path label` (videos) or `path frames label` (frame folders)
    train_root: str = ""
    val_list: str = ""
    val_root: str = ""
    labels: str = ""  # label CSV with columns id,name; or one name a line
    features: str = ""  # folder of `kineticlip features`, read in place of the videos
    frame_template: str = "img_{:05d}.jpg"  # {id} stands for the folder's own name
    frames_per_second: float = 24.0  # of the frame folders, where a list gives times (Charades)
    decoder: Literal["auto", "dali", "torchcodec", "pyav"] = "auto"
    num_frames: int = 8  # T
    resolution: int = 224  # S, side of the square crop
    pipeline: Literal["auto", "text4vis", "evl", "bike"] = "auto"  # auto: the method's own
    sampling: Literal["uniform", "dense"] = "uniform"
    sampling_rate: int = 16  # frame stride of the evl pipeline's dense sampling
    augmentation: Literal["none", "released", "published"] = "released"
    flip: bool = True  # mirror half of the training clips; off where direction is the label
    something: bool = False  # Something-Something: fixed frame size, label-swapping mirror
    min_frames: int = 0  # shorter entries of the training list are dropped and counted
    val_min_frames: int = 0  # so for the list to score; 8 in official training, 0 in official tests
    shots: int = 0  # K-shot training; 0 trains on everything
    workers: int = 2  # decoding threads of one process
    probe_cache: str = "auto"  # file of probes, so that opening again costs no pass; auto, off


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Views of one video at test time: clips x crops."""

    clips: int = 1
    crops: Literal[1, 3, 5, 10] = 1
    sampling: Literal["uniform", "dense"] = "uniform"


@dataclass(frozen=True, kw_only=True)
class Text4VisConfig:
    """Text4Vis: frame embeddings, a temporal header, a frozen text classifier."""

    header: Literal["mean", "transformer"] = "transformer"
    header_layers: int = 6
    temporal_module: Literal["none", "tokenshift", "tokent1d", "tsm"] = "none"
    joint: bool = False  # joint space-time attention
    drop_out: float = 0.0  # stochastic depth of the last block; rises linearly from none
    attention_drop_out: float = 0.0  # of attention weights, rising alike; officially tied to that
    embedding_drop_out: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Text4Vis's contrastive baseline; its trunk and header are those of `text4vis` above."""

    loss: Literal["nce", "ds", "ce"] = "nce"  # ce: over all classes, encoded at every step
    text: Literal["online", "frozen"] = "online"  # frozen: features of the classes, made once
    gather: bool = True  # pairs of all processes are each other's negatives
    train_visual: bool = True


@dataclass(frozen=True, kw_only=True)
class BikeConfig:
    """BIKE: Text4Vis's trunk and header (`text4vis` above); how frames meet the class names."""

    interaction: Literal["vcs", "dp"] = "vcs"  # weighted by the words' saliency; or averaged
    # frames: without header and interaction, the softmax of each raw frame embedding, averaged;
    # the zero-shot numbers that the official test_zeroshot prints are these
    scores: Literal["head", "frames"] = "head"


@dataclass(frozen=True, kw_only=True)
class EvlConfig:
    """EVL: one query per clip reads the tokens of the last blocks of a frozen trunk."""

    layers: int = 4  # K: decoder layers, on as many last blocks
    qkv_dim: int = 0  # D, width of the query's attention; 0: the trunk's width
    heads: int = 0  # 0: one for every 64 of the width
    mlp_factor: float = 4.0
    class_drop_out: float = 0.5  # before the last linear layer
    mlp_drop_out: float = 0.5
    temporal_conv: bool = True
    temporal_position: bool = True
    temporal_attention: bool = True
    finetune: bool = False  # train the trunk too
    backbone_precision: Literal["train", "bf16", "fp16"] = "train"  # of a frozen trunk in training
    backbone: str = "openai"  # the trunk, where model.weights holds a decoder alone


@dataclass(frozen=True, kw_only=True)
class VitaConfig:
    """Vita-CLIP: prompts around two frozen towers."""

    summary: bool = True  # a token a frame: what its class token learns of the other frames'
    local_prompts: bool = True  # a token for each frame of a clip, seen by all of them
    global_prompts: int = 8  # learned tokens of each block; 0: none
    text: Literal["prompts", "classifier"] = "prompts"  # learned words; or `classifier` above
    context: int = 8  # learned words around a class name
    context_words: str = ""  # they start as these words and are shared; underscores are spaces
    position: Literal["end", "middle", "front"] = "end"  # of the class name
    per_class: bool = True  # every class its own words; off: one set that fits any classes
    train_cls_proj: bool = False  # the published code leaves this layer as it was drawn


@dataclass(frozen=True, kw_only=True)
class XClipConfig:
    """X-CLIP: message tokens, frame integration, text conditioned on the video."""

    integration_layers: int = 1  # of the transformer over frame embeddings
    integration_heads: int = 0  # 0: one for every 64 of the width
    prompt_layers: int = 2  # of the cross-attention from text to patches
    prompt_heads: int = 8
    prompt_scale: float = 1e-4  # initial weight of what the video adds to the text
    train_text: bool = False  # the text tower; the released runs keep it as it is


@dataclass(frozen=True, kw_only=True)
class VifiConfig:
    """ViFi-CLIP: both towers fine-tuned, frame embeddings averaged."""

    train_text: bool = True
    train_visual: bool = True


@dataclass(frozen=True, kw_only=True)
class ActionClipConfig:
    """ActionCLIP: its header is that of `text4vis` above."""

    templates: tuple[str, ...] = ("actionclip",)  # one is drawn for each training clip
    train_text: bool = True


@dataclass(frozen=True, kw_only=True)
class OpenVclipConfig:
    """Open-VCLIP: attention over neighbouring frames, weights drawn back towards CLIP."""

    clip_share: float = 0.0  # of CLIP's own weights in those that are scored
    clip_weights: str = "openai"
    pull: float = 0.0  # in training: of a second loss, at weights drawn back; the paper's is 0.5
    pull_shares: tuple[float, float] = (0.0, 0.6)  # of CLIP's weights in it, drawn every time


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with two learning rates and a per-iteration schedule."""

    lr: float = 5e-5
    clip_ratio: float = 0.1  # learning rate of the CLIP parameters, relative to lr
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_epochs: float = 5.0
    milestones: tuple[float, ...] = ()  # epochs, for multistep
    official_updates: bool = False  # the official code's steps: lr set every tenth iteration
    rate_at: Literal["middle", "start"] = "middle"  # the point of a step that gives it its lr


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop: length, batch, precision, ZeRO, what is written and when."""

    epochs: float = 30.0
    steps: int = 0  # optimiser steps, in place of epochs; 0: epochs
    average_from: int = 0  # the mean of the weights at the ends of this and later epochs; 0: none
    batch_size: int = 256  # global: clips per optimiser step
    micro_batch_size: int = 8  # clips per process and forward
    precision: Precision = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    gradient_clipping: float = 0.0  # 0 turns it off
    activation_checkpointing: bool = False  # whole blocks anew in the backward pass
    recompute_outputs: bool = False  # LayerNorm's and QuickGELU's alone: no product twice
    deepspeed: str = ""  # a DeepSpeed JSON laid under the engine's own settings
    checkpoint_every: int = 1000  # optimiser steps
    keep_checkpoints: int = 2
    eval_every: float = 1.0  # epochs; 0 evaluates at the end only
    log_every: int = 10  # optimiser steps
    max_skipped_steps: int = 20  # consecutive non-finite steps before the run stops


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The evaluation loop."""

    precision: EvalPrecision = "bf16"
    compile: Compile = "auto"  # a CUDA graph on a GPU, packed layers on a CPU; always: Inductor
    batch_frames: int = 0  # images per forward; 0 finds the fastest that fits
    deterministic: bool = False  # fixed batch shapes: results repeat to the byte


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, whole. `method` names an entry of kineticlip.methods.METHODS."""

    name: str = "run"
    method: str = "text4vis"
    seed: int = 1024
    output: str = ""  # empty: runs/<name>
    model: ModelConfig = field(default_factory=ModelConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: DataConfig = field(default_factory=DataConfig)
    test: ViewConfig = field(default_factory=ViewConfig)
    text4vis: Text4VisConfig = field(default_factory=Text4VisConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    bike: BikeConfig = field(default_factory=BikeConfig)
    evl: EvlConfig = field(default_factory=EvlConfig)
    vitaclip: VitaConfig = field(default_factory=VitaConfig)
    xclip: XClipConfig = field(default_factory=XClipConfig)
    vificlip: VifiConfig = field(default_factory=VifiConfig)
    actionclip: ActionClipConfig = field(default_factory=ActionClipConfig)
    openvclip: OpenVclipConfig = field(default_factory=OpenVclipConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def output_dir(self) -> Path:
        return Path(self.output or f"runs/{self.name}")

    @property
    def rounds_clip(self) -> bool:
        """Whether this method's CLIP weights go through fp16: see model.rounding."""
        return self.model.rounding == "official" and self.method in CLIP_LOAD


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file (None: all defaults) and applies `key=value` overrides in order.

    path may also be the bare name of a recipe that ships with the engine. An official Text4Vis or
    BIKE file is translated; each of its keys that has no effect is logged as a warning. Raises
    UserError for a missing or malformed file, an unknown key and a value of a wrong type.
    """
    config, notes = read_config(path, overrides)
    for note in notes:
        log.warning(note)
    return config


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """`load_config`, and the notes on an official file instead of warnings."""
    where: dict[str, str] = {}
    values: dict[str, Any] = {}
    notes: list[str] = []
    if path is not None:
        values = _read_yaml(_locate(path), where, notes)
    for pair in overrides:
        _apply_override(values, pair, where)
    return _validate(values, where, str(path) if path is not None else "--set"), notes


def override(config: Config, pairs: Sequence[str]) -> Config:
    """The configuration with `key=value` pairs applied in order."""
    where: dict[str, str] = {}
    values = config_to_dict(config)
    for pair in pairs:
        _apply_override(values, pair, where)
    return _validate(values, where, "--set")


def config_from_dict(values: Mapping[str, Any], source: str) -> Config:
    """The configuration of plain data, such as a weights file's metadata; `source` is named in
    errors."""
    _check_keys(values, Config, "", {}, source)
    return _validate(dict(values), {}, source)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain data, ready for YAML or JSON."""
    plain = dataclasses.asdict(config)
    return {key: _plain(value) for key, value in plain.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _locate(path: str | Path) -> Path:
    """The file itself, or the recipe of that name: beside this package, or in the repository."""
    given = Path(path)
    if given.exists() or given.suffix or len(given.parts) != 1:
        return given
    package = Path(__file__).parent
    folders = (package / "configs", package.parents[1] / "configs")
    recipes = {file.stem: file for folder in folders for file in folder.glob("*.yaml")}
    if given.name not in recipes:
        raise UserError(
            f"{path}: no such file, and no recipe of that name. {did_you_mean(str(path), recipes)}"
        )
    return recipes[given.name]


def _read_yaml(path: Path, where: dict[str, str], notes: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(f"{path}{line}: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: expected a mapping of config keys")
    lines: dict[str, str] = {}
    for dotted, number in _key_lines(node, ""):
        if dotted in lines:
            raise UserError(f"{path}:{number}: '{dotted}' stands in {lines[dotted]} already")
        lines[dotted] = f"{path}:{number}"
    if is_official(values):
        official = translate(values, lines, str(path))
        values, lines = official.values, official.where
        notes += official.notes
    where.update(lines)
    _check_keys(values, Config, "", where, str(path))
    return dict(values)


def _key_lines(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        yield dotted, key.start_mark.line + 1
        yield from _key_lines(value, f"{dotted}.")


def _check_keys(
    values: Mapping[Any, Any], kind: type, prefix: str, where: Mapping[str, str], source: str
) -> None:
    hints = get_type_hints(kind)
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        place = where.get(dotted, source)
        if key not in hints:
            raise UserError(f"{place}: unknown key '{dotted}'. {did_you_mean(str(key), hints)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise UserError(f"{place}: '{dotted}' should be a mapping, got {value!r}")
            _check_keys(value, hints[key], f"{dotted}.", where, source)
        elif isinstance(value, Mapping):
            raise UserError(f"{place}: '{dotted}' should be a single value, not a mapping")


def _apply_override(values: dict[str, Any], pair: str, where: dict[str, str]) -> None:
    dotted, equals, text = pair.partition("=")
    place = f"--set {pair}"
    if not equals:
        raise UserError(f"{place}: expected key=value")
    *parents, leaf = dotted.split(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if _type_of(dotted) == "str" and not isinstance(value, str):
        value = text  # the template {}, the name 8: words, whatever YAML makes of them
    node: Any = value if value is not None or text.strip() in ("null", "~") else ""
    nested: dict[str, Any] = {leaf: node}
    for parent in reversed(parents):
        nested = {parent: nested}
    _check_keys(nested, Config, "", {dotted: place}, place)
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
    target[leaf] = node
    where[dotted] = place


def _type_of(dotted: str) -> str | None:
    """The annotation of a dotted key; None where there is no such key."""
    kind: Any = Config
    for part in dotted.split("."):
        if not dataclasses.is_dataclass(kind):
            return None
        kind = get_type_hints(kind).get(part)
    return getattr(kind, "__name__", None)


def _validate(values: dict[str, Any], where: Mapping[str, str], source: str) -> Config:
    from pydantic import TypeAdapter, ValidationError

    try:
        config = TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            dotted = ".".join(str(part) for part in item["loc"] if isinstance(part, str))
            message = item["msg"][0].lower() + item["msg"][1:]
            problems.append(
                f"{where.get(dotted, source)}: '{dotted}': {message}, got {item['input']!r}"
            )
        raise UserError("; ".join(problems)) from None
    _check_ranges(config, where, source)
    return config


AT_LEAST = {
    1: """data.num_frames data.resolution data.workers test.clips train.batch_size
       train.micro_batch_size train.checkpoint_every train.log_every evl.layers""",
    0: """data.min_frames data.val_min_frames data.shots data.frames_per_second optim.lr
       optim.clip_ratio optim.weight_decay optim.warmup_epochs train.epochs train.steps
       train.gradient_clipping train.eval_every eval.batch_frames""",
}
SHARES = """text4vis.drop_out text4vis.attention_drop_out text4vis.embedding_drop_out
    evl.class_drop_out evl.mlp_drop_out"""


def _check_ranges(config: Config, where: Mapping[str, str], source: str) -> None:
    for least, names in AT_LEAST.items():
        for dotted in names.split():
            value = attrgetter(dotted)(config)
            if not value >= least:  # nan is not either
                place = where.get(dotted, source)
                raise UserError(f"{place}: '{dotted}' should be at least {least}, got {value}")
    for dotted in SHARES.split():
        value = attrgetter(dotted)(config)
        if not 0 <= value < 1:
            place = where.get(dotted, source)
            raise UserError(f"{place}: '{dotted}' should be from 0 to below 1, got {value}")
