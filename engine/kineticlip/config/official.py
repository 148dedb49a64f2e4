"""The YAML files of the official Text4Vis and BIKE repositories, read as they are.

Those codes ignore many keys and invent missing ones. Here every key has a meaning, is named as
one that the official code ignores too (one note each), or is an error with its line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from kineticlip.runtime.errors import UserError, did_you_mean

SECTIONS = ("network", "solver")  # top-level keys that only the official grammar has
_ABSENT = (None, "", "None")  # YAML reads `None` as a string; the official codes act as if absent
_TEMPLATES = {"text4vis": "a video of a person {}.", "bike": "This is a video about {}"}


@dataclass(frozen=True, kw_only=True)
class Translation:
    """An official file in our grammar: nested values, where each came from, and what to tell.

    where maps our dotted keys to file:line; notes are whole sentences, one for each key that has
    no effect and each choice that the file leaves open.
    """

    values: dict[str, Any]
    where: dict[str, str]
    notes: list[str]


@dataclass
class _Reader:
    """The file as flat official keys, and the translation as it grows."""

    path: str
    keys: dict[str, Any]
    lines: Mapping[str, str]
    processes: int
    flat: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        value = self.keys.get(key)
        return default if value in _ABSENT else value

    def put(self, ours: str, value: Any, key: str) -> None:
        self.flat[ours] = value
        self.where[ours] = self.place(key)

    def place(self, key: str) -> str:
        return self.lines.get(key, self.path)

    def note(self, key: str, text: str) -> None:
        self.notes.append(f"{self.place(key)}: '{key}' {text}")

    def error(self, key: str, text: str) -> UserError:
        return UserError(f"{self.place(key)}: '{key}' {text}")

    @property
    def bike(self) -> bool:
        return "network.interaction" in self.keys

    def integer(self, key: str, default: int) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"should be a whole number, got {value!r}")
        return value


Rule = Callable[[_Reader, str, Any], None]  # (reader, official key, value that is not absent)


def _to(ours: str) -> Rule:
    """The same value under our name."""
    return lambda reader, key, value: reader.put(ours, value, key)


def _ignored(reason: str) -> Rule:
    return lambda reader, key, value: reader.note(key, f"has no effect: {reason}")


def _nothing(reader: _Reader, key: str, value: Any) -> None:
    """Read together with another key."""


def _zero_only(reason: str) -> Rule:
    def rule(reader: _Reader, key: str, value: Any) -> None:
        if value:
            raise reader.error(key, f"should be 0: {reason}")

    return rule


def _pretrain(reader: _Reader, key: str, value: Any) -> None:
    reader.put("model.weights", value, key)
    if not reader.bike:  # checkpoints of train.py hold no text tower
        reader.put("classifier.text_weights", "openai", key)


def _resume(reader: _Reader, key: str, value: Any) -> None:
    raise reader.error(
        key,
        "names an official checkpoint, whose optimiser cannot be continued; write it as "
        "'pretrain' to start from its weights (our own runs resume by themselves)",
    )


def _dataset(reader: _Reader, key: str, value: Any) -> None:
    if "something" in str(value):  # the only thing that the official code asks of the name
        reader.put("data.something", True, key)


def _modality(reader: _Reader, key: str, value: Any) -> None:
    if value not in ("RGB", "video"):  # frame folders or files: seen from the lists themselves
        raise reader.error(key, f"should be RGB or video, got {value!r}")


def _random_shift(reader: _Reader, key: str, value: Any) -> None:
    if not value:
        raise reader.error(key, "should be True: training always draws its frames at random")


def _dense(reader: _Reader, key: str, value: Any) -> None:
    if value:
        reader.put("data.sampling", "dense", key)


def _frame_names(reader: _Reader, key: str, value: Any) -> None:
    # Charades: the first field is the folder's name, which BIKE fills in with the number.
    fields = str(value).count("{")
    reader.put("data.frame_template", str(value).replace("{}", "{id}", fields - 1), key)


def _arch(reader: _Reader, key: str, value: Any) -> None:
    name = str(value)
    if name.endswith((".pt", ".pth", ".safetensors")):
        raise reader.error(
            key, "names a file; give the CLIP model here and --set model.weights=FILE"
        )
    reader.put("model.arch", name.replace("/", "-").removesuffix("px"), key)


def _init(reader: _Reader, key: str, value: Any) -> None:
    if not value:
        reader.put("classifier.text_weights", "random", key)
        reader.note(key, "is False: the text tower, and so the classifier, is random")


def _temporal_module(reader: _Reader, key: str, value: Any) -> None:
    if value in (False, "False"):
        return
    resnet = str(reader.get("network.arch", "")).startswith("RN")
    if resnet:
        reader.put("text4vis.temporal_module", "tsm", key)
        if value == "tokent1d":
            reader.note(key, "means tsm in a ResNet; the official code then leaves conv1 random")
    elif value in (True, "True"):
        reader.note(key, "has no effect: True adds nothing to a ViT; name tsm or tokenshift")
    else:
        reader.put("text4vis.temporal_module", value, key)


def _drop_out(reader: _Reader, key: str, value: Any) -> None:
    reader.put("text4vis.drop_out", value, key)
    if value:
        reader.note(key, "drops residual branches; attention weights: text4vis.attention_drop_out")


def _header(reader: _Reader, key: str, value: Any) -> None:
    if value != "Transf":
        raise reader.error(key, f"should be Transf or None, got {value!r}")


def _interaction(reader: _Reader, key: str, value: Any) -> None:
    if value not in ("DP", "VCS"):
        raise reader.error(key, f"should be DP or VCS, got {value!r}")
    reader.put("bike.interaction", str(value).lower(), key)


def _fix_video(reader: _Reader, key: str, value: Any) -> None:
    if value and reader.bike:
        raise reader.error(key, "should be False: training with a frozen tower is not supported")
    if not reader.bike:
        reader.note(key, "has no effect: only train_nce.py reads it")


def _fix_text(reader: _Reader, key: str, value: Any) -> None:
    if not reader.bike:
        reader.note(key, "has no effect: the text tower is always frozen")
    elif not value:
        raise reader.error(key, "should be True: the text tower is always frozen")


def _loss(reader: _Reader, key: str, value: Any) -> None:
    if not reader.bike:
        reader.note(key, "has no effect: only train_nce.py reads it")
    elif value != "NCE":
        raise reader.error(key, f"should be NCE, BIKE's loss, got {value!r}")


def _optimiser(reader: _Reader, key: str, value: Any) -> None:
    if not reader.bike:
        reader.note(key, "has no effect: train.py always uses AdamW")
    elif value != "adamw":
        raise reader.error(key, f"should be adamw, got {value!r}")


def _milestones(reader: _Reader, key: str, value: Any) -> None:
    if reader.get("solver.type") != "multistep":
        reader.note(key, "has no effect: the schedule is not multistep")
        return
    epochs = reader.integer("solver.epochs", 30)
    if isinstance(value, list):
        milestones = value
    else:
        step = reader.integer(key, 0)
        if step < 1:
            raise reader.error(key, f"should be at least 1, got {step}")
        milestones = list(range(step, epochs + 1, step))
    warmup = reader.get("solver.lr_warmup_step", 0)
    if not milestones or milestones[0] <= warmup:
        raise reader.error(key, f"should begin after the warm-up of {warmup} epochs, got {value}")
    reader.put("optim.milestones", milestones, key)


def _evaluate(reader: _Reader, key: str, value: Any) -> None:
    if value:
        reader.note(key, "has no effect: kineticlip eval evaluates")


_NO_RANDAUG = "the released code has no RandAugment; data.augmentation=published has it"
_ATTRIBUTES = "the attribute branch is trained apart from the video branch"

# Official key -> what becomes of it. A key that is not here is an error.
RULES: dict[str, Rule] = {
    "seed": _to("seed"),
    "pretrain": _pretrain,
    "resume": _resume,
    "data.dataset": _dataset,
    "data.modality": _modality,
    "data.num_segments": _to("data.num_frames"),
    "data.seg_length": _ignored("a segment is always one frame"),
    "data.batch_size": _nothing,
    "data.workers": _to("data.workers"),
    "data.num_classes": _ignored("the label list decides"),
    "data.image_tmpl": _frame_names,
    "data.train_root": _to("data.train_root"),
    "data.train_list": _to("data.train_list"),
    "data.val_root": _to("data.val_root"),
    "data.val_list": _to("data.val_list"),
    "data.label_list": _to("data.labels"),
    "data.index_bias": _ignored("frame files are always numbered from 1"),
    "data.input_size": _to("data.resolution"),
    "data.randaug.N": _ignored(_NO_RANDAUG),
    "data.randaug.M": _ignored(_NO_RANDAUG),
    "data.random_shift": _random_shift,
    "data.dense": _dense,
    "data.shot": _to("data.shots"),
    "data.output_path": _nothing,
    "data.fps": _to("data.frames_per_second"),
    "data.select_topk_attributes": _ignored(_ATTRIBUTES),
    "data.attributes_train_path": _ignored(_ATTRIBUTES),
    "data.attributes_val_path": _ignored(_ATTRIBUTES),
    "network.arch": _arch,
    "network.init": _init,
    "network.tm": _temporal_module,
    "network.drop_out": _drop_out,
    "network.emb_dropout": _to("text4vis.embedding_drop_out"),
    "network.sim_header": _header,
    "network.interaction": _interaction,
    "network.joint_st": _to("text4vis.joint"),
    "network.fix_text": _fix_text,
    "network.fix_video": _fix_video,
    "network.type": _ignored("nothing reads it"),
    "network.drop": _ignored("nothing reads it"),
    "network.n_emb": _ignored("nothing reads it"),
    "solver.type": _to("optim.schedule"),
    "solver.epochs": _to("train.epochs"),
    "solver.start_epoch": _zero_only("a run begins at its beginning"),
    "solver.epoch_offset": _ignored("nothing reads it"),
    "solver.optim": _optimiser,
    "solver.lr": _to("optim.lr"),
    "solver.lr_warmup_step": _to("optim.warmup_epochs"),
    "solver.lr_decay_step": _milestones,
    "solver.momentum": _ignored("AdamW has none"),
    "solver.weight_decay": _to("optim.weight_decay"),
    "solver.loss_type": _loss,
    "solver.evaluate": _evaluate,
    "solver.clip_ratio": _to("optim.clip_ratio"),
    "solver.grad_accumulation_steps": _nothing,
    "logging.print_freq": _nothing,
    "logging.eval_freq": _to("train.eval_every"),
}


def is_official(values: Mapping[Any, Any]) -> bool:
    """Whether a YAML document is of the official grammar: it has `network` or `solver`."""
    return any(section in values for section in SECTIONS)


def translate(
    values: Mapping[Any, Any],
    lines: Mapping[str, str],
    path: str,
    *,
    processes: int | None = None,
) -> Translation:
    """An official document in our grammar; lines maps its dotted keys to file:line.

    processes: official batch sizes are for one process, ours for all of them together; None takes
    the number that the launcher announces. Raises UserError for an unknown key, with a suggestion,
    and for a value that asks for what neither code base does.
    """
    launched = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or "1"
    world = processes or int(launched)
    reader = _Reader(path=path, keys=_flatten(values), lines=lines, processes=world)
    _check_known(reader)
    for key in reader.keys:
        value = reader.get(key)
        if value is not None:
            RULES[key](reader, key, value)
    _settle(reader)
    nested: dict[str, Any] = {}
    for dotted, value in reader.flat.items():
        *parents, leaf = dotted.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return Translation(values=nested, where=reader.where, notes=reader.notes)


def _flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{dotted}."))
        else:
            flat[dotted] = value
    return flat


def _check_known(reader: _Reader) -> None:
    sections = {key.rpartition(".")[0] for key in RULES} - {""}
    for key in [key for key in reader.keys if key not in RULES]:
        if key in sections:
            if reader.keys[key] not in (*_ABSENT, {}):
                raise reader.error(key, f"should be a mapping, got {reader.keys[key]!r}")
            del reader.keys[key]  # an empty section
            continue
        section, _, leaf = key.rpartition(".")
        siblings = [
            known.removeprefix(f"{section}.")
            for known in (*RULES, *sections)
            if known.rpartition(".")[0] == section
        ]
        raise UserError(
            f"{reader.place(key)}: unknown key '{key}' of an official config. "
            f"{did_you_mean(leaf, siblings)}"
        )


def _settle(reader: _Reader) -> None:
    """What follows from several keys, or from none."""
    method = "bike" if reader.bike else "text4vis"
    reader.put("method", method, "network.interaction")
    reader.put("classifier.template", _TEMPLATES[method], "data.label_list")
    header = "transformer" if reader.get("network.sim_header") else "mean"
    reader.put("text4vis.header", header, "network.sim_header")
    reader.put("data.augmentation", "released", "data.randaug")
    if "data.fps" not in reader.keys:  # all but Charades leave out what is shorter in a frame list
        reader.put("data.min_frames", 8, "data.train_list")
    reader.put("optim.official_updates", True, "solver")
    _settle_batches(reader)
    name = "-".join(
        (
            str(reader.get("data.dataset", "videos")),
            method,
            str(reader.flat.get("model.arch", "vit")).lower(),
            f"f{reader.flat.get('data.num_frames', 8)}",
            *([f"shot{reader.get('data.shot')}"] if reader.get("data.shot") else []),
        )
    )
    reader.put("name", name, "data.dataset")
    root = reader.get("data.output_path")
    if root:
        reader.put("output", str(PurePosixPath(str(root)) / name), "data.output_path")


def _settle_batches(reader: _Reader) -> None:
    accumulation = reader.integer("solver.grad_accumulation_steps", 1)
    if "data.batch_size" in reader.keys:
        micro = reader.integer("data.batch_size", 1)
        whole = micro * accumulation * reader.processes
        reader.put("train.micro_batch_size", micro, "data.batch_size")
        reader.put("train.batch_size", whole, "data.batch_size")
        reader.note(
            "data.batch_size",
            f"is for one process: {micro} clips x {accumulation} accumulated x "
            f"{reader.processes} processes = {whole} per optimiser step",
        )
    if "logging.print_freq" in reader.keys:
        every = reader.integer("logging.print_freq", 10) // max(accumulation, 1)
        reader.put("train.log_every", max(every, 1), "logging.print_freq")
