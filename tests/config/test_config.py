"""The config file: every default in one place, every mistake named with its line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_type_hints

import pytest

from kineticlip.config import Config, config_to_dict, load_config
from kineticlip.runtime.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_values_come_from_the_file_and_overrides_win(tmp_path: Path) -> None:
    path = write(tmp_path, "data:\n  num_frames: 16\noptim:\n  lr: 5e-5\n")
    config = load_config(path, ["data.num_frames=32", "classifier.template=a clip of {}"])
    assert config.data.num_frames == 32
    assert config.optim.lr == 5e-5  # YAML 1.1 reads 5e-5 as a string
    assert config.classifier.template == "a clip of {}"
    assert config.data.resolution == Config().data.resolution


def test_words_stay_words_in_overrides() -> None:
    config = load_config(None, ["classifier.template={}", "name=8", "data.val_root="])
    assert (config.classifier.template, config.name, config.data.val_root) == ("{}", "8", "")
    quoted = load_config(None, ["classifier.template='a {}'", 'name="on"'])
    assert (quoted.classifier.template, quoted.name) == ("a {}", "on")


def test_unknown_key_names_file_line_and_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\ndata:\n  num_frame: 8\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value) == (
        f"{path}:3: unknown key 'data.num_frame'. Did you mean 'num_frames'?"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:\n  num_frames: abc\n", ":2: 'data.num_frames': input should be a valid integer"),
        ("model:\n  kernels: fast\n", ":2: 'model.kernels': input should be 'auto'"),
        ("data: 3\n", ":1: 'data' should be a mapping"),
        ("- 1\n", ":1: expected a mapping"),
        ("data:\n  num_frames: [\n", "expected the node content"),
        ("data:\n  num_frames: 0\n", ":2: 'data.num_frames' should be at least 1, got 0"),
        ("optim:\n  lr: -1e-3\n", ":2: 'optim.lr' should be at least 0, got -0.001"),
        ("train:\n  epochs: .nan\n", ":2: 'train.epochs' should be at least 0, got nan"),
        ("evl:\n  mlp_drop_out: 1\n", ":2: 'evl.mlp_drop_out' should be from 0 to below 1, got"),
        ("train:\n  epochs: .inf\n", ":2: 'train.epochs' should be finite, got inf"),
        ("seed: -1\n", ":1: 'seed' should be from 0 to below 2147483648, got -1"),
        ("optim:\n  betas: [1.5, 0.9]\n", ":2: 'optim.betas' should be from 0 to below 1, got 1.5"),
        ("optim:\n  betas: [.9, .nan]\n", ":2: 'optim.betas' should be from 0 to below 1, got nan"),
        (
            "optim:\n  milestones: [3, -4]\n",
            "'optim.milestones' should be at least 0, got -4.0",
        ),
        (
            "openvclip:\n  clip_share: 1.5\n",
            "clip_share' should be from 0 to 1, got 1.5",
        ),
        ("evl:\n  mlp_factor: 0\n", ":2: 'evl.mlp_factor' should be above 0, got 0.0"),
        ("xclip:\n  prompt_scale: .nan\n", ":2: 'xclip.prompt_scale' should be finite, got nan"),
        ("train:\n  keep_checkpoints: 0\n", "'train.keep_checkpoints' should be at least 1, got 0"),
        ("model:\n  arch: {x: 3}\n", ":2: 'model.arch' should be a single value"),
        ("seed: 1\nname: a\nseed: 2\n", ":3: 'seed' stands in "),
        ("data:\n  flip: on\n  shots: 1\n  flip: off\n", ":4: 'data.flip' stands in "),
    ],
)
def test_wrong_values_are_one_line_with_their_place(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(str(path))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def numbers(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(dotted key, int or float) of every number of the configuration."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from numbers(cast(type, hint), f"{prefix}{name}.")
        elif hint in (int, float):
            yield f"{prefix}{name}", hint


@pytest.mark.parametrize(("key", "kind"), [*numbers()], ids=str)
def test_every_number_has_a_range(key: str, kind: type) -> None:
    """No key takes a value that no run can mean; what is left is for the methods to refuse."""
    for value in ("-1", ".nan", ".inf", "-.inf") if kind is float else ("-1",):
        if (key, value) != ("xclip.prompt_scale", "-1"):
            with pytest.raises(UserError, match=rf"'{key}' should be .*, got "):
                load_config(None, [f"{key}={value}"])


def test_several_mistakes_are_told_together(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: -1\ndata:\n  workers: 0\n  num_frames: many\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).count("; ") == 2
    assert f"{path}:3: 'data.workers' should be at least 1, got 0" in str(error.value)


def test_the_fields_do_not_import_what_checks_them() -> None:
    code = "import sys, kineticlip.config.schema; print('pydantic' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_wrong_overrides_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--set data.num_frame=3: unknown key .*'num_frames'"):
        load_config(None, ["data.num_frame=3"])
    with pytest.raises(UserError, match=r"--set model\.arch\.x=3: .* should be a single"):
        load_config("k400-text4vis-vitb16-f8", ["model.arch.x=3"])
    with pytest.raises(UserError, match="expected key=value"):
        load_config(None, ["seed"])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: no such config"):
        load_config(tmp_path / "nothing.yaml")


def test_a_config_survives_being_written_and_read(tmp_path: Path) -> None:
    import yaml

    config = load_config(None, ["data.num_frames=32", "optim.milestones=[3, 5]"])
    path = write(tmp_path, yaml.safe_dump(config_to_dict(config)))
    assert load_config(path) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_loads_and_is_named_after_its_file(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert len(path.read_text().splitlines()) <= 70


def test_a_recipe_is_found_by_its_bare_name() -> None:
    assert load_config("k400-text4vis-vitl14_336-f32").data.num_frames == 32
    with pytest.raises(UserError, match="Did you mean 'k400-text4vis-vitl14_336-f32'"):
        load_config("k400-text4vis-vitl14-336-f32")
