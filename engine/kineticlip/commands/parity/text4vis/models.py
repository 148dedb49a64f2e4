"""Models built from official checkpoint files, against the outputs of the official model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kineticlip.commands.parity.check import Check, compare, exactly
from kineticlip.commands.parity.text4vis.files import EMBEDDINGS, Golden
from kineticlip.config import Config, DataConfig, Text4VisConfig
from kineticlip.formats import convert, load_into, round_like_clip
from kineticlip.methods.text4vis import VideoCLIP, video_model
from kineticlip.methods.trunk import apply_header
from kineticlip.models.architectures import Architecture
from kineticlip.models.classifier import Classifier
from kineticlip.models.temporal import TemporalTransformer
from kineticlip.models.text import encode_text, text_tower
from kineticlip.models.weights import Weights

Header = Literal["mean", "transformer"]

HEADERS: dict[str, Header] = {"None": "mean", "Transf": "transformer"}
HEADER_KEYS = "fusion_model (sim_header Transf adds)"  # an entry of checkpoint_keys.json


def cases(golden: Golden) -> list[str]:
    """The model cases that a folder lists: vit_plain, rn_tsm, ..."""
    return [name for name in golden.json("checkpoint_keys") if name != HEADER_KEYS]


def official_keys(golden: Golden, case: str, *, header: Header) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `VideoCLIP.state_dict()` in the official code, in its order."""
    keys = golden.json("checkpoint_keys")
    listed = keys[case] + (keys[HEADER_KEYS] if header == "transformer" else [])
    return {name: tuple(shape) for name, shape in listed}


def write_checkpoint(golden: Golden, case: str, path: Path, *, header: Header) -> None:
    """The file that the official train.py would save for a case."""
    recorded = golden.tensors(f"case_{case}")
    state = golden.tensors(golden.metadata(f"case_{case}")["base"])
    state |= golden.tensors("fusion_transf")
    state |= {
        name.removeprefix("weights."): tensor
        for name, tensor in recorded.items()
        if name.startswith("weights.")
    }
    names = official_keys(golden, case, header=header)
    tensors = {name: state[name.replace(".net.", ".")] for name in names}
    torch.save({"epoch": 0, "model_state_dict": tensors}, path)


def case_config(golden: Golden, case: str, *, header: Header) -> tuple[Config, Architecture]:
    """The configuration of a case, and the architecture that its weights are of."""
    options = golden.metadata(f"case_{case}")
    model = golden.resnet if options["base"] == "clip_rn_visual" else golden.vit
    module: Any = "none" if options["tm"] == "False" else options["tm"]
    config = Config(
        data=DataConfig(num_frames=int(options["T"]), resolution=model.vision.resolution),
        text4vis=Text4VisConfig(
            header=header, temporal_module=module, joint=options["joint_st"] == "True"
        ),
    )
    return config, model


def build_case(golden: Golden, case: str, *, header: Header) -> VideoCLIP:
    """The engine's model of a case, read from an official checkpoint file."""
    config, architecture = case_config(golden, case, header=header)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        write_checkpoint(golden, case, path, header=header)
        model = video_model(config, Weights(architecture, str(path), path))
    features = golden.tensors("case_text")["text_features"]
    model.set_classifier(Classifier(features, golden.class_names))
    return model.eval()


def case_clips(golden: Golden, case: str) -> Tensor:
    """The pixels of a case, uint8 [B, T, 3, S, S]."""
    options = golden.metadata(f"case_{case}")
    name = "frames_rn" if options["base"] == "clip_rn_visual" else "frames_vit"
    frames, length = golden.tensors(name)[name], int(options["T"])
    clips: Tensor = frames[: len(frames) // length * length].unflatten(0, (-1, length))
    return clips[: int(options["batch"])]


def model_checks(golden: Golden, case: str) -> Iterator[Check]:
    """Frame and video embeddings and logits of one case, with either header."""
    recorded, clips = golden.tensors(f"case_{case}"), case_clips(golden, case)
    for name, header in HEADERS.items():
        model = build_case(golden, case, header=header)
        with torch.inference_mode():
            if header == "mean":
                frames = model.visual(clips.flatten(0, 1))
                expected = recorded["frame_embeddings"]
                yield compare(f"{case}/frame_embeddings", frames, expected, atol=EMBEDDINGS)
            for what, found in (
                (f"video_embedding_{name}", model.encode_clips(clips)),
                (f"logits_{name}", model(clips)),
            ):
                yield compare(f"{case}/{what}", found, recorded[what], atol=EMBEDDINGS)


def text_checks(golden: Golden) -> Iterator[Check]:
    """Features of token rows."""
    recorded = golden.tensors("case_text")
    tower = text_tower(golden.text, golden.tensors("clip_vit_base"))
    with torch.inference_mode():
        features = encode_text(tower, recorded["tokens"].long())
    yield compare("text/features", features, recorded["text_features"], atol=EMBEDDINGS)


def header_checks(golden: Golden) -> Iterator[Check]:
    """The temporal header alone: long clips, and an epsilon that only tiny inputs reveal."""
    recorded, prefix = golden.tensors("case_fusion_only"), "fusion_model."
    vit, positions = golden.vit, golden.text.context
    header = TemporalTransformer(vit.embed, vit.header_heads, positions=positions).eval()
    weights = golden.tensors("fusion_transf")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    load_into(header, tensors, what="fusion_transf.safetensors")
    with torch.inference_mode():
        found = {
            "y_Transf": apply_header(header, recorded["x"]).mean(dim=1),
            "y_None": apply_header(None, recorded["x"]).mean(dim=1),
        }
        header.frame_position_embeddings.weight.zero_()
        found["y_small_pos_zero"] = apply_header(header, recorded["x_small"]).mean(dim=1)
    for name, value in found.items():
        yield compare(f"header/{name}", value, recorded[name], atol=EMBEDDINGS)


def checkpoint_checks(golden: Golden, case: str) -> Iterator[Check]:
    """An official file read and written back has the official names and shapes."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "official.pt", Path(folder) / "ours.pt"
        for name, header in HEADERS.items():
            write_checkpoint(golden, case, source, header=header)
            convert(source, target, to="text4vis")
            written = torch.load(target, weights_only=True)["model_state_dict"]
            found = {key: tuple(tensor.shape) for key, tensor in written.items()}
            expected = official_keys(golden, case, header=header)
            missing, more = expected.keys() - found.keys(), found.keys() - expected.keys()
            misshapen = {
                key for key in found.keys() & expected.keys() if found[key] != expected[key]
            }
            yield exactly(f"checkpoint/{case}/{name}", sorted(missing | more | misshapen), [])


def rounding_checks(golden: Golden) -> Iterator[Check]:
    """What `clip.load` rounds through float16, told by values that float16 does not have."""
    recorded = golden.json("clip_load_fp16_rounding")
    state = golden.tensors("clip_vit_base")
    odd = {name: torch.full_like(tensor, 1 + 2**-13) for name, tensor in state.items()}
    rounded = round_like_clip(odd)
    for what, changed in (("rounded_to_fp16_on_clip_load", True), ("kept_fp32", False)):
        found = [name for name in odd if torch.equal(rounded[name], odd[name]) != changed]
        yield exactly(f"rounding/{what}", sorted(found), sorted(recorded[what]))
