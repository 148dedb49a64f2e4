"""`kineticlip doctor`: every op, the face that runs, and the reasons."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from kineticlip.__main__ import main
from kineticlip.commands import doctor
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


def test_text_says_a_shared_reason_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--precision", "fp32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("  add_layer_norm ")]
    assert line.split(maxsplit=2)[2] == "x, weight, bias: on cpu"


def test_a_wrong_op_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, *, impl: str) -> torch.Tensor:
        choose("wrong", impl, ["no reason"])
        return 2 * x

    def made(device: torch.device, dtype: torch.dtype) -> dict[str, Example]:
        return {"wrong": Example(wrong, {"x": torch.ones(3)}, lambda x: x)}

    monkeypatch.setattr("kineticlip_kernels.examples.examples", made)
    args = SimpleNamespace(device="cpu", precision="fp32", json=False)
    assert doctor.run(args) == 1
    (op,) = doctor.examine("cpu", "fp32")["ops"]
    assert op["checked"] == ["output 0: error 1, allowed 1e-06: FAILED"]


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
