"""Results survive kills and torn lines, and say what they are the results of."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from safetensors.numpy import save_file

from kineticlip.config import load_config
from kineticlip.evaluation import metrics
from kineticlip.evaluation.fingerprint import protocol_fingerprint
from kineticlip.evaluation.result_writer import ResultWriter
from kineticlip.evaluation.results import Results, read_results
from kineticlip.evaluation.rows import VideoRow, summarize
from kineticlip.runtime.errors import UserError
from made_results import SPEED

NAMES = ["a red ball", "b\u00e4r \u718a", "<script>", "running", "jumping", "sitting", "eating"]
ENTRIES = [(f"clips/video {n}.mp4", n % len(NAMES)) for n in range(20)]
PROTOCOL = {"weights": "untrained", "clips": 2, "config": {"test": {"crops": 3}}}
MACHINE = {"cpu": "two cores", "torch": "2.11"}


def scores_of(position: int) -> np.ndarray:
    raw = np.random.default_rng(position).random(len(NAMES), dtype=np.float32)
    raw[ENTRIES[position][1]] += 0.4
    return raw / raw.sum()


def open_writer(folder: Path, **changes: Any) -> ResultWriter:
    options: dict[str, Any] = {"entries": ENTRIES, "class_names": NAMES, "keep_scores": True}
    options |= changes
    return ResultWriter.open(folder, options.pop("protocol", PROTOCOL), **options)


def add(writer: ResultWriter, position: int) -> None:
    video = ENTRIES[position][0]
    if position % 9 == 4:
        writer.add_bad(video, "no video stream\n(audio only)")
    else:
        writer.add(video, scores_of(position), views=6, frames=30 + position, decoder="pyav")


def run(folder: Path, positions: Sequence[int] = range(20)) -> dict[str, Any]:
    with open_writer(folder) as writer:
        for position in positions:
            add(writer, position)
        return writer.finish(machine=MACHINE, speed=SPEED, extra={"mAP": 7.0})


def test_rows_hold_everything_in_list_order(tmp_path: Path) -> None:
    run(tmp_path, list(reversed(range(len(ENTRIES)))))
    results = read_results(tmp_path)
    assert [row.video for row in results.rows] == [video for video, _ in ENTRIES]
    for position, row in enumerate(results.rows):
        label = ENTRIES[position][1]
        assert (row.label, row.label_name) == (label, NAMES[label])
        if position % 9 == 4:
            assert (row.status, row.reason) == ("bad", "no video stream (audio only)")
            assert (row.prediction, row.top5, row.correct) == (None, [], False)
            continue
        order = np.argsort(-scores_of(position))[:5]
        assert row.top5 == order.tolist() and row.prediction == order[0]
        assert row.top5_names == [NAMES[c] for c in order]
        assert np.array_equal(np.array(row.top5_scores, np.float32), scores_of(position)[order])
        assert row.correct == (order[0] == label)
        assert (row.views, row.frames, row.decoder) == (6, 30 + position, "pyav")
    kept = results.scores()
    assert kept is not None and kept.shape == (20, 7)
    assert np.array_equal(kept[7], scores_of(7)) and np.isnan(kept[4]).all()


def test_summary_counts_and_intervals(tmp_path: Path) -> None:
    summary = run(tmp_path)
    assert summary == read_results(tmp_path).summary
    good = [n for n in range(20) if n % 9 != 4]
    matrix = np.stack([scores_of(n) for n in good])
    labels = [ENTRIES[n][1] for n in good]
    assert summary["top1"] == pytest.approx(metrics.topk_accuracy(matrix, labels))
    assert summary["top5"] == pytest.approx(metrics.topk_accuracy(matrix, labels, k=5))
    ranks = metrics.rank_of_label(matrix, labels)
    assert summary["top1_interval"] == list(metrics.bootstrap_interval(ranks < 1))
    confusion = metrics.confusion_matrix(
        metrics.top_classes(matrix, 1)[:, 0], labels, num_classes=7
    )
    assert summary["mean_class_accuracy"] == metrics.mean_class_accuracy(confusion)
    assert summary["top1_bad_as_wrong"] == pytest.approx(summary["top1"] * 18 / 20)
    assert (summary["videos"], summary["scored"], summary["bad"]) == (20, 18, 2)
    assert summary["bad_reasons"] == {"no video stream (audio only)": 2}
    assert summary["decoders"] == {"pyav": 18} and summary["views"] == 108
    assert summary["protocol"] == PROTOCOL and summary["machine"] == MACHINE
    assert summary["speed"] == SPEED.to_json() and summary["extra"] == {"mAP": 7.0}


def test_parquet_metadata_carry_the_provenance(tmp_path: Path) -> None:
    run(tmp_path)
    metadata = json.loads(parquet.read_schema(tmp_path / "results.parquet").metadata[b"kineticlip"])
    assert metadata == {"format": 1, "protocol": PROTOCOL, "machine": MACHINE}


def test_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with open_writer(tmp_path / "parts") as writer:
        for position in (3, 4, 0):
            add(writer, position)
    with open_writer(tmp_path / "parts") as writer:
        assert writer.done == {ENTRIES[n][0] for n in (3, 0)}  # 4 was bad, and is tried again
        for position in range(20):
            if ENTRIES[position][0] not in writer.done:
                add(writer, position)
        writer.finish(machine=MACHINE)
    for name in ("results.parquet", "scores.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_killed_process_loses_nothing(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, test_results as t\n"
        "from pathlib import Path\n"
        "writer = t.open_writer(Path(sys.argv[1]))\n"
        "for n in range(5): t.add(writer, n)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment)
    assert done.returncode == -signal.SIGKILL
    with open_writer(tmp_path) as writer:
        assert writer.done == {ENTRIES[n][0] for n in range(4)} and writer.dropped_bytes == 0


@pytest.mark.parametrize("tail", [b'{"video": "clips/vid', b"\0" * 64, b'[1, 2]\n{"video": "x"}\n'])
def test_torn_end_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    with open_writer(tmp_path) as writer:
        add(writer, 0)
    journal = tmp_path / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + tail)
    with open_writer(tmp_path) as writer:
        assert writer.done == {ENTRIES[0][0]} and writer.dropped_bytes == len(tail)
        add(writer, 1)
    assert journal.read_bytes().startswith(whole)
    with open_writer(tmp_path) as writer:
        assert len(writer.done) == 2 and writer.dropped_bytes == 0


def test_every_prefix_of_a_journal_can_be_continued(tmp_path: Path) -> None:
    with open_writer(tmp_path / "whole", keep_scores=False) as writer:
        for position in (0, 1, 4):
            add(writer, position)
    data = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    for length in range(0, len(data), 7):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(data[:length])
        with open_writer(folder, keep_scores=False) as writer:
            lines = data[:length].count(b"\n")
            assert len(writer.done) == max(0, lines - 1)


def test_another_protocol_is_refused_by_name(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        add(writer, 0)
    changed = PROTOCOL | {"config": {"test": {"crops": 1}}}
    with pytest.raises(UserError, match=r"protocol\.config\.test\.crops is 3 there and 1 here"):
        open_writer(tmp_path, protocol=changed)
    with pytest.raises(UserError, match="keep_scores is true there and false here"):
        open_writer(tmp_path, keep_scores=False)
    open_writer(tmp_path).close()  # neither attempt kept the lock


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with open_writer(tmp_path), pytest.raises(UserError, match="another process is writing"):
        open_writer(tmp_path)


def test_unfinished_and_unfit_input_is_refused(tmp_path: Path) -> None:
    with open_writer(tmp_path / "run") as writer:
        add(writer, 0)
        with pytest.raises(UserError, match=r"19 of 20 videos have no result yet, first .*1\.mp4"):
            writer.finish(machine=MACHINE)
        bad = scores_of(1)
        bad[2] = np.nan
        with pytest.raises(UserError, match=r"clips/video 1\.mp4: its scores are not finite"):
            writer.add(ENTRIES[1][0], bad, views=1, frames=1, decoder="pyav")
        assert len(writer.done) == 1
    with pytest.raises(UserError, match="its evaluation has not finished"):
        read_results(tmp_path / "run")
    with pytest.raises(UserError, match="label 7, but there are 7 classes"):
        open_writer(tmp_path / "labels", entries=[("a.mp4", 7)])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        open_writer(tmp_path / "file")


def test_full_disk_is_one_line_and_a_torn_one(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    with open_writer(tmp_path) as writer:
        add(writer, 0)
        length = journal.stat().st_size
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (length + 10, before[1]))
        try:
            with pytest.raises(
                UserError, match=r"journal\.jsonl: cannot be written: File too large"
            ):
                add(writer, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert journal.stat().st_size == length + 10
    with open_writer(tmp_path) as writer:
        assert writer.done == {ENTRIES[0][0]} and writer.dropped_bytes == 10


def test_video_listed_twice_has_two_rows(tmp_path: Path) -> None:
    entries = [("a.mp4", 0), ("b.mp4", 1), ("a.mp4", 2)]
    with open_writer(tmp_path, entries=entries) as writer:
        writer.add("a.mp4", [0, 0, 9, 0, 0, 0, 0], views=1, frames=5, decoder="pyav")
        writer.add("b.mp4", [0, 9, 0, 0, 0, 0, 0], views=1, frames=5, decoder="pyav")
        writer.finish(machine=MACHINE)
    rows = read_results(tmp_path).rows
    assert [(row.video, row.correct) for row in rows] == [
        ("a.mp4", False),
        ("b.mp4", True),
        ("a.mp4", True),
    ]


def test_nothing_scored_gives_no_numbers(tmp_path: Path) -> None:
    for entries in ([], [("a.mp4", 0)]):
        folder = tmp_path / str(len(entries))
        with open_writer(folder, entries=entries) as writer:
            for video, _ in entries:
                writer.add_bad(video, "")
            summary = writer.finish(machine=MACHINE)
        assert summary["top1"] is None and summary["top1_interval"] is None
        assert summary["mean_class_accuracy"] is None
        assert [row.reason for row in read_results(folder).rows] == ["unknown"] * len(entries)


def test_thumbnails_and_classifier_come_back(tmp_path: Path) -> None:
    frames = np.full((3, 48, 64, 3), 90, dtype=np.uint8)
    with open_writer(tmp_path) as writer:
        writer.save_thumbnail(ENTRIES[6][0], frames)
        writer.save_classifier(np.eye(7, 9))
    with open_writer(tmp_path) as writer:
        writer.save_thumbnail(ENTRIES[2][0], frames[:1])
        for position in range(20):
            add(writer, position)
        writer.finish(machine=MACHINE)
    results = read_results(tmp_path)
    assert results.thumbnails() == [
        {"file": "2.jpg", "video": ENTRIES[2][0], "label": 2, "frames": 1},
        {"file": "6.jpg", "video": ENTRIES[6][0], "label": 6, "frames": 3},
    ]
    assert (tmp_path / "thumbnails" / "6.jpg").read_bytes()[:2] == b"\xff\xd8"
    classifier = results.classifier()
    assert classifier is not None and np.array_equal(classifier, np.eye(7, 9))


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such results folder"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no summary\.json here; not a results folder"):
        read_results(tmp_path)
    folder = tmp_path / "run"
    run(folder)
    assert read_results(folder).classifier() is None and read_results(folder).thumbnails() == []
    save_file({"weight": np.eye(2)}, folder / "classifier.safetensors")
    with pytest.raises(UserError, match=r"expected a matrix 'classifier', found \['weight'\]"):
        read_results(folder).classifier()
    (folder / "classifier.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_results(folder).classifier()
    (folder / "thumbnails").mkdir()
    (folder / "thumbnails" / "index.json").write_text('{"file": 1}')
    with pytest.raises(UserError, match="expected a list of objects"):
        read_results(folder).thumbnails()
    (folder / "results.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"results\.parquet: cannot be read as Parquet"):
        read_results(folder)
    (folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: cannot be read as JSON"):
        read_results(folder)
    (folder / "summary.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="not a summary of format 1"):
        read_results(folder)


def test_summary_of_another_run_is_noticed(tmp_path: Path) -> None:
    summary = run(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"videos": 3}))
    with pytest.raises(UserError, match="has 20 rows"):
        read_results(tmp_path)


def test_fingerprint_follows_what_changes_a_score() -> None:
    def fingerprint(*overrides: str, label: int = 0, names: list[str] = NAMES) -> dict[str, Any]:
        return protocol_fingerprint(
            load_config(None, overrides), [("a.mp4", label)], class_names=names, weights="openai"
        )

    base = fingerprint()
    assert fingerprint("output=elsewhere", "data.workers=7", "optim.lr=1", "name=x") == base
    for changed in (
        fingerprint("test.clips=4"),
        fingerprint("eval.precision=fp32"),
        fingerprint("classifier.template=a clip of {}."),
        fingerprint(label=1),
        fingerprint(names=NAMES[::-1]),
    ):
        assert changed != base
    assert json.loads(json.dumps(base)) == base


def test_summary_of_one_class() -> None:
    row = VideoRow(
        video="a.mp4", label=0, label_name="all", prediction=0, top5=[0], top5_names=["all"],
        top5_scores=[1.0], correct=True, views=1, frames=9, decoder="pyav", status="ok", reason="",
    )  # fmt: skip
    summary = summarize([row], ["all"])
    assert (summary["top1"], summary["top5"], summary["mean_class_accuracy"]) == (100, 100, 100)
    assert summary["top1_interval"] == [100, 100]


def test_results_take_their_name_from_the_folder(tmp_path: Path) -> None:
    assert Results(folder=tmp_path / "a" / "..", summary={}, rows=[]).name == tmp_path.name
