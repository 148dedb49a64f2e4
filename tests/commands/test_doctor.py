"""`kineticlip doctor`: every op, the face that runs, and the reasons."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace

import pytest
import torch
from torch._inductor import config as inductor

from kineticlip.__main__ import main
from kineticlip.commands import doctor
from kineticlip.commands.doctor.parts import PARTS
from kineticlip.video import dali, torchcodec
from kineticlip_kernels.dispatch import choose, recorded_choices
from kineticlip_kernels.examples import Example, examples

CPU = torch.device("cpu")


def test_json_names_every_op_its_face_and_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    ops = {op["op"]: op for op in document["ops"]}
    assert ops.keys() == examples(CPU, torch.bfloat16).keys()
    assert ops["layer_norm"]["face"] == "reference"
    assert "x is on cpu" in ops["layer_norm"]["why_not_faster"]
    assert ops["attention"]["face"] == "chunked"  # bf16 without gradients
    compared = [op for op in document["ops"] if op["checked"]]
    assert len(compared) >= 10 and all(op["passed"] is True for op in compared)
    assert all(op["passed"] is None for op in document["ops"] if not op["checked"])
    assert document["software"]["torch"] == torch.__version__.partition("+")[0]
    assert {decoder["name"] for decoder in document["decoders"]} == {"pyav", "torchcodec", "dali"}
    assert document["verdict"].startswith(f"works: all {len(ops)} ops on cpu")
    assert all(part["present"] != bool(part["reason"]) for part in document["parts"])


def test_text_says_a_shared_reason_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--precision", "fp32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("works: ") and not lines[1]
    (line,) = [line for line in lines if line.startswith("  add_layer_norm ")]
    assert line.split(maxsplit=2)[2] == "x, weight, bias: on cpu"


def test_a_wrong_op_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, *, impl: str) -> torch.Tensor:
        choose("wrong", impl, ["no reason"])
        return 2 * x

    def made(device: torch.device, dtype: torch.dtype) -> dict[str, Example]:
        return {"wrong": Example(wrong, {"x": torch.ones(3)}, lambda x: x)}

    monkeypatch.setattr("kineticlip_kernels.examples.examples", made)
    args = Namespace(device="cpu", precision="fp32", json=False)
    assert doctor.run(args) == 1
    document = doctor.examine("cpu", "fp32")
    (op,) = document["ops"]
    assert op["checked"] == ["output 0: error 1, allowed 1e-06: FAILED"]
    assert document["verdict"] == "FAILED: wrong: beyond the tolerance on cpu"


def test_missing_parts_are_said_with_what_they_add_and_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a bare machine, and all that can be left uninstalled."""
    find = importlib.util.find_spec
    absent = ("torchcodec", "nvidia", "triton", "xformers", "tensorboard")
    for name in [name for name in sys.modules if name.partition(".")[0] in absent[:2]]:
        monkeypatch.delitem(sys.modules, name)
    for name in absent[:2]:
        monkeypatch.setitem(sys.modules, name, None)
    torchcodec.load.cache_clear()
    dali.load.cache_clear()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    monkeypatch.setattr("kineticlip_kernels.examples.examples", lambda *_: {})
    with inductor.patch({"cpp.cxx": "no-such-compiler"}):  # PATH is searched once, and not again
        assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    verdict, *rest = out.splitlines()
    names = [part.name for part in PARTS]
    assert verdict == f"works: all 0 ops on cpu; optional parts missing: {', '.join(names)}"
    block = rest[rest.index("optional parts that are missing:") + 1 :][: 2 * len(names)]
    for part, adds, reason in zip(PARTS, block[::2], block[1::2], strict=True):
        assert adds.split("adds ") == [f"  {part.name:<13} ", part.adds]
        assert "install" in reason and reason.startswith(" " * 16)


@pytest.mark.needs_compiler
@pytest.mark.needs_torchcodec
def test_parts_that_are_there_are_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    block = capsys.readouterr().out.partition("optional parts")[2]
    assert "torchcodec" not in block and "C++ compiler" not in block


def test_without_pyav_nothing_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kineticlip_kernels.examples.examples", lambda *_: {})
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.startswith("FAILED: pyav: import of av halted")


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_device_that_is_not_there(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    if device == "cuda" and torch.cuda.is_available():
        device = "cuda:x"
    assert main(["doctor", "--device", device]) == 2
    assert f"--device {device}" in capsys.readouterr().err


def test_choices_are_recorded_only_within() -> None:
    with recorded_choices() as choices:
        choose("op", "auto", ["x is on cpu"])
    choose("op", "auto", [])
    assert [(c.op, c.face, c.why_not) for c in choices] == [("op", "reference", ("x is on cpu",))]
