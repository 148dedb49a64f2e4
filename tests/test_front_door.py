"""`import kineticlip` and the console script: what they offer, and that they start at once."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kineticlip
from kineticlip.__main__ import COMMANDS, main
from kineticlip.commands.demo.clips import render_clip, write_clip
from kineticlip.config import ClassifierConfig, Config, DataConfig, ModelConfig, Text4VisConfig
from kineticlip.formats.trained import export_weights
from kineticlip.methods import METHODS

ENGINE = Path(__file__).parents[1] / "engine"
README = ENGINE / "README.md"
HEAVY = {"torch", "numpy", "av", "pydantic", "yaml", "PIL", "open_clip", "deepspeed", "pyarrow"}


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after running code."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(ran.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import kineticlip; kineticlip.__version__; dir(kineticlip)",
        "import kineticlip; kineticlip.UserError",
        "import kineticlip.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit: pass",
        "import kineticlip.__main__ as m; m.main([])",
        "import kineticlip.__main__ as m; m.main(['evall'])",
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_used(code: str) -> None:
    loaded = loaded_by(code)
    assert "kineticlip" in loaded
    assert loaded & HEAVY == set()


def test_every_promised_name_is_there_and_typed_from_the_same_module() -> None:
    homes: dict[str, str] = {}
    for node in ast.walk(ast.parse((ENGINE / "kineticlip" / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            homes |= {alias.name: node.module for alias in node.names}
    assert set(kineticlip.__all__) <= set(dir(kineticlip))
    for name in kineticlip.__all__:
        found = getattr(kineticlip, name)
        assert found is getattr(importlib.import_module(homes[name]), name)
        assert name in ("METHODS", "__version__") or found.__doc__


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'recognise'"):
        getattr(kineticlip, "recognise")  # noqa: B009  # a type checker refuses it too
    with pytest.raises(ImportError):
        exec("from kineticlip import recognise")


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: kineticlip")
    assert all(f"\n    {name}" in printed.err for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["evall"], "'evall'. Did you mean 'eval'?"),
        (["--local_rank=0", "trian"], "'trian'. Did you mean 'train'?"),
        (["qqq"], "'qqq'. Known: attributes, bench, "),
    ],
)
def test_a_misspelt_command_names_its_neighbour(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: there is no command {hint}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("rank", [["--local_rank", "0"], ["--local_rank=0"]])
def test_a_rank_may_stand_before_the_command(
    rank: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*rank, "eval", "--help"])
    assert ended.value.code == 0
    assert "--num-processes" in capsys.readouterr().out


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the examples of engine/README.md name."""
    names = ("a red ball moving left", "a blue ball growing", "a white ball moving up")
    (tmp_path / "clips").mkdir()
    for number, (thing, motion) in enumerate(((0, 0), (2, 4), (5, 2))):
        clip = render_clip(thing, motion, np.random.default_rng(number))
        write_clip(tmp_path / "clips" / f"{number}.mp4", clip)
    (tmp_path / "val.txt").write_text("".join(f"{number}.mp4 {number}\n" for number in range(3)))
    config = Config(
        model=ModelConfig(arch="ViT-tiny-16", weights="random"),
        classifier=ClassifierConfig(template="{}"),
        data=DataConfig(num_frames=2, resolution=64),
        text4vis=Text4VisConfig(header="mean"),
    )
    state = METHODS["text4vis"].build(config, names).state_dict()
    path = tmp_path / "weights.safetensors"
    export_weights(path, state, config=config, class_names=names, step=1, classifier={})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_the_readme_run(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "12 frames, 1 views, decoded by pyav\n" in printed
    assert re.search(r"^top-1 \d+\.\d % of 3 videos, 0 unreadable$", printed, re.MULTILINE)
    assert "val.txt: " in printed.splitlines()[-1]
    frames = names["frames"]
    assert isinstance(frames, np.ndarray)
    assert (frames.shape, frames.dtype) == ((2, 64, 80, 3), np.uint8)


def test_the_readme_has_a_row_for_every_room() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", README.read_text(), re.MULTILINE))
    rooms = {path.parent.name for path in (ENGINE / "kineticlip").glob("*/__init__.py")}
    assert rows == rooms
