"""The kernel benchmarks: result files, their validator, the command, and tuning."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kineticlip.__main__ import main
from kineticlip_kernels import tune, tuning
from kineticlip_kernels.cost import Cost
from kineticlip_kernels.examples import examples
from kineticlip_kernels.tune import Target, TooLarge

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import kernel_bench  # noqa: E402
import run_parts  # noqa: E402
from kernel_results import LIMITS, ROWS, STEPS, TESTS, gather, result_path, validate  # noqa: E402


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """What `kineticlip bench --json` prints for the LayerNorm cases, on this machine."""
    command = [
        sys.executable,
        "-m",
        "kineticlip",
        "bench",
        "--json",
        "--only",
        "test_norm and bf16",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def test_a_run_makes_a_valid_document(measured: dict[str, Any]) -> None:
    assert validate(measured) == []
    assert measured["complete"] is True
    ops = {(row["op"], row["direction"]) for row in measured["rows"]}
    directions = ("forward", "forward+backward")
    assert ops == {(op, d) for op in ("layer_norm", "add_layer_norm") for d in directions}
    assert all(row["dtype"] == "bf16" for row in measured["rows"])


def test_numbers_of_a_row_fit_together(measured: dict[str, Any]) -> None:
    copy_limit = measured["limits"]["copy_gb_per_s"]
    for row in measured["rows"]:
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["p50_ms"] / 1e6)
        expected = None  # a CPU's caches hold inputs of its small shapes
        if measured["machine"]["gpus"]:
            expected = pytest.approx(100 * row["gb_per_s"] / copy_limit)
        assert row["percent_of_limit"] == expected


@pytest.mark.parametrize(
    ("size", "cold"),
    [
        (200_000_000, True),
        (5_000_000, True),
        (8 * 12 * 400 * 2, True),  # mean_softmax
        (8 * 3 * 768 * 2, True),  # frame_attention of one clip
        (1000, False),
        (0, False),
    ],
)
def test_copies_of_the_inputs_pass_the_cache_three_times(size: int, cold: bool) -> None:
    cache = 50 << 20
    copies, found = kernel_bench.copies_of(size, cache)
    assert found is cold and copies >= 2
    assert ((copies - 1) * size >= 3 * cache) is cold


def test_no_percentage_of_the_copy_limit_from_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_bench, "_limits", {"copy": 1e9, "bf16": 1e12})
    shape = kernel_bench.Shape("s", 1, 1, 1, 1)

    def percent(cold: bool, **cost: float) -> float | None:
        case = kernel_bench.Case("op", "i", torch.bfloat16, shape, Cost(**cost), tuple, print)
        prepared = kernel_bench.Prepared(lambda: None, 1, None, cold)
        found: float | None = kernel_bench.row(case, prepared, [4.0])["percent_of_limit"]
        return found

    copied, multiplied = {"flops": 1e6, "bytes": 1e6}, {"flops": 1e9, "bytes": 1.0}
    assert percent(True, **copied) == percent(True, **multiplied) == pytest.approx(25)
    assert percent(False, **copied) is None
    assert percent(False, **multiplied) == pytest.approx(25)


def test_limits_are_measured_after_200_ms_of_calls() -> None:
    starts: list[float] = []

    def call() -> None:
        starts.append(time.perf_counter())
        time.sleep(0.02)

    assert 0.02 <= kernel_bench.best_seconds(call) < 0.2
    assert starts[-kernel_bench.REPEATS] - starts[0] >= 0.2


def test_a_cpu_claims_no_kernel(measured: dict[str, Any]) -> None:
    if not measured["machine"]["gpus"]:
        assert {row["impl"] for row in measured["rows"]} == {"reference"}
        assert measured["config"]["blocks"]["table"] == "none"


def drop(content: dict[str, Any]) -> None:
    del content["limits"]


def misspell(content: dict[str, Any]) -> None:
    content["rows"][0]["p95_ms"] = 1.0


def infinite(content: dict[str, Any]) -> None:
    content["rows"][0]["p50_ms"] = float("inf")


def unordered(content: dict[str, Any]) -> None:
    content["rows"][0]["p20_ms"] = content["rows"][0]["p80_ms"] + 1


def repeat(content: dict[str, Any]) -> None:
    content["rows"].append(content["rows"][0])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (drop, "document: no limits"),
        (misspell, "rows[0]: unknown p95_ms"),
        (infinite, "rows[0]: p50_ms is inf"),
        (unordered, "rows[0]: percentiles are not in order"),
        (repeat, "twice"),
    ],
)
def test_the_validator_finds(
    damage: Callable[[dict[str, Any]], None], problem: str, measured: dict[str, Any]
) -> None:
    content = copy.deepcopy(measured)
    damage(content)
    assert any(problem in found for found in validate(content)), validate(content)


def test_committed_results_are_valid() -> None:
    folder = ROOT / "bench/results"
    contents = {path: json.loads(path.read_text()) for path in folder.glob("*/*.json")}
    for path, content in contents.items():
        if content.get("kind") == "kernels":
            assert validate(content) == [], path
            assert result_path(folder, content).parent == path.parent, path


def test_results_are_named_after_device_torch_date_and_commit(measured: dict[str, Any]) -> None:
    content = copy.deepcopy(measured)
    content["machine"]["gpus"] = [{"name": "NVIDIA H200"}]
    content["software"] |= {"torch": "2.11.0+cu130", "commit": "3f2c1ab9"}
    content["date"] = "2026-11-01T10:00:00Z"
    assert result_path(Path("r"), content) == Path("r/h200-torch2.11.0/20261101-3f2c1ab.json")


def test_every_op_has_a_benchmark() -> None:
    ops = set()
    for path in (ROOT / "bench").glob("test_*.py"):
        spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look themselves up there
        spec.loader.exec_module(module)
        ops |= {case.op.removesuffix(" qkv") for case in module.CASES}
    assert examples(torch.device("cpu"), torch.float32).keys() <= ops


def test_a_run_in_parts_loses_nothing_but_what_failed(
    measured: dict[str, Any], tmp_path: Path
) -> None:
    for row in measured["rows"]:
        run_parts.append(tmp_path / ROWS, row)
    (tmp_path / LIMITS).write_text(json.dumps({"copy": 5e10, "bf16": 1e12}))
    for node, outcome in [("tests/kernels/a.py::b", "passed"), ("bench/c.py::d", "failed")]:
        run_parts.append(tmp_path / TESTS, {"node": node, "outcome": outcome})
    step = {"name": "short table", "seconds": 9, "status": 0}
    run_parts.append(tmp_path / STEPS, step)
    content = gather(tmp_path)
    assert validate(content) == [] and content["rows"] == measured["rows"]
    assert content["limits"] == {"copy_gb_per_s": 50.0, "matmul_tflop_per_s": {"bf16": 1.0}}
    assert content["correctness"] == {"passed": 1, "skipped": 0, "failed": ["bench/c.py::d"]}
    assert content["complete"] is True and content["config"]["steps"] == [step]
    assert "liger" in content["config"]["absent"] or measured["machine"]["gpus"]
    run_parts.append(tmp_path / STEPS, step | {"status": 124})
    assert gather(tmp_path)["complete"] is False


def test_gpu_script_refuses_a_machine_without_one() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh")],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    assert "no GPU here; ON_CPU=1" in done.stderr


MINIMAL = """
import importlib.util, runpy, sys
from importlib.abc import MetaPathFinder

class OnlyThese(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ABSENT = ("torchvision PIL av torchcodec open_clip deepspeed safetensors pydantic yaml pyarrow "
          "jinja2 sklearn xformers ftfy regex transformers hjson huggingface_hub").split()
sys.meta_path.insert(0, OnlyThese())
find = importlib.util.find_spec  # says None of what is absent
importlib.util.find_spec = lambda name, *rest: None if name in ABSENT else find(name, *rest)
sys.argv[0] = "importable.py"
runpy.run_path("bench/importable.py", run_name="__main__")
"""


def test_the_kernels_tests_need_no_installation_but_those_against_other_files() -> None:
    """What gpu.sh runs where only torch, triton, numpy and pytest are."""
    files = sorted(path for path in (ROOT / "tests/kernels").glob("test_*.py"))
    names = [str(path.relative_to(ROOT)) for path in files if "aot" not in path.name]
    paths = ("engine", "kernels", "tests/kernels", "bench")
    done = subprocess.run(
        [sys.executable, "-c", MINIMAL, *names],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ":".join(str(ROOT / path) for path in paths)},
    )
    left_out = {Path(name).stem for name in {*names} - {*done.stdout.split()}}
    assert left_out == {"test_class_loss", "test_patches_pillow", "test_evl_official",
                        "test_temporal_official"}, done.stderr  # fmt: skip


def test_tuning_takes_the_fastest_row_that_runs() -> None:
    seen: list[int] = []
    device = torch.device("cpu")

    def make(device: torch.device) -> Callable[[], int]:
        return lambda: tuning.blocks("layer_norm_forward", device)["BLOCK_ROWS"]

    def measure(run: Callable[[], int]) -> float:
        assert not torch.autograd.is_multithreading_enabled()  # other threads see no candidate
        rows = run()
        seen.append(rows)
        if rows == 8:
            raise TooLarge
        return abs(rows - 2) + 0.5

    target = Target(
        "layer_norm_forward", {"row_bytes": 4096}, make, tune.grid(BLOCK_ROWS=(1, 2, 4, 8))
    )
    ((found, times),) = tune.tune([target], device, measure)
    assert seen == [1, 2, 4, 8] and found is target
    assert times == [({"BLOCK_ROWS": 2}, 0.5), ({"BLOCK_ROWS": 1}, 1.5), ({"BLOCK_ROWS": 4}, 2.5)]
    before = tuning.read_table("default")
    table = tune.with_rows(before, [(target, times[0][0])])
    assert table["layer_norm_forward"][1] == {"max_row_bytes": 4096, "BLOCK_ROWS": 2}
    assert table["layer_norm_forward"][0] == before["layer_norm_forward"][0]
    assert make(device)() == tuning.blocks("layer_norm_forward", device, row_bytes=1)["BLOCK_ROWS"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--write", "x.json"], "--write FILE needs --tune"),
        (["--tune"], "sees no GPU here"),
        (["--aot", "--only", "norm", "--short"], "--only, --short: only for timing"),
        (["--tune", "--allow-dirty"], "--allow-dirty: only for timing"),
        (["--only", "nosuchcase"], "no case matches --only 'nosuchcase' here"),
    ],
)
def test_command_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments == ["--tune"] and torch.cuda.is_available():
        arguments, message = ["--write", "y.json"], "needs --tune"
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
