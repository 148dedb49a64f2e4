"""List files in every format, label files, built-in classes, K-shot subsets, templates."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kineticlip.config import load_config, override
from kineticlip.data.entries import Entry
from kineticlip.data.few_shot import few_shot
from kineticlip.data.labels import BUILT_IN, read_labels, split_words
from kineticlip.data.list_writer import list_text, write_few_shot
from kineticlip.data.lists import read_list, scoring_list, training_list
from kineticlip.data.order import order_of
from kineticlip.models.prompts import ENSEMBLES, TEMPLATES, expand_templates, render
from kineticlip.runtime.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def write(tmp_path: Path):
    def write_list(text: str, name: str = "list.txt") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_list


def test_video_list(write) -> None:
    listed = read_list(write("a/b.mp4 3\r\n\nmassaging_person's_head/c.mp4 0\n"), "root")
    assert listed.entries == (
        Entry("a/b.mp4", "root/a/b.mp4", 3),
        Entry("massaging_person's_head/c.mp4", "root/massaging_person's_head/c.mp4", 0),
    )
    assert listed.summary().endswith("list.txt: 2 videos")


def test_frame_list_leaves_out_short_and_empty_folders_and_names_them(write) -> None:
    path = write("v_a 17 67\nv_b 7 1\nv_c 0 2\nv_d 8 5\n")
    listed = read_list(path, min_frames=8)
    assert [(entry.name, entry.num_frames) for entry in listed.entries] == [("v_a", 17), ("v_d", 8)]
    assert (listed.short, listed.empty) == (("v_b",), ("v_c",))
    assert "1 with fewer than 8 frames" in listed.summary()
    assert "1 without frames left out (v_c" in listed.summary()
    assert [entry.name for entry in read_list(path).entries] == ["v_a", "v_b", "v_d"]


def test_comma_list_and_quoted_paths(write) -> None:
    listed = read_list(write("my clips/a, b.mp4,3\nx.mp4,0\n"))
    assert [(entry.name, entry.label) for entry in listed.entries] == [
        ("my clips/a, b.mp4", 3),
        ("x.mp4", 0),
    ]
    quoted = read_list(write('"my clips/a 1.mp4" 3\nplain.mp4 4\n'))
    assert [entry.name for entry in quoted.entries] == ["my clips/a 1.mp4", "plain.mp4"]
    folders = read_list(write('"my clips/a 1" 30 3\n'), "r")
    assert folders.entries == (Entry("my clips/a 1", "r/my clips/a 1", 3, num_frames=30),)
    assert read_list(write('"a,b.mp4",3\n')).entries[0].name == "a,b.mp4"


def test_a_list_may_have_no_labels(write) -> None:
    entries = read_list(write('a.mp4\n"b c, d.mp4"\n'), "r", num_classes=3).entries
    assert [entry.name for entry in entries] == ["a.mp4", "b c, d.mp4"]
    assert all((entry.label, entry.labels) == (-1, ()) for entry in entries)
    with pytest.raises(UserError, match="this list has none, or several"):
        order_of(entries, load_config(None))
    quoted_first = read_list(write('"b c, d.mp4"\na.mp4\n')).entries
    assert [entry.name for entry in quoted_first] == ["b c, d.mp4", "a.mp4"]


def test_absolute_paths_ignore_the_root(write) -> None:
    assert read_list(write("/data/a.mp4 1\n"), "root").entries[0].path == "/data/a.mp4"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a.mp4 1\nb c.mp4 2\n", "list.txt:2: expected 'path label', got 3 fields; a path with"),
        ("a.mp4\nb.mp4 1\n", "list.txt:2: expected a path alone, as in the first line, got 2"),
        ("a.mp4;1\nb.mp4;2\n", "list.txt:1: 'a.mp4;1' looks like a path and a label"),
        ("a 9 1\nb 2\n", "list.txt:2: expected 'path frames label', got 2 fields"),
        ("my clip.mp4 2\n", "list.txt:1: 'clip.mp4' is not a number of frames; a path with spaces"),
        ("a 9 1\nb -3 1\n", "list.txt:2: the number of frames is negative"),
        ("a.mp4 1\n\n\nb.mp4 two\n", "list.txt:4: the label is not an integer: 'two'"),
        ("a.mp4 1\nb.mp4 5\n", "list.txt:2: label 5 is out of range: expected 0..4"),
        ("a.mp4 -1\n", "list.txt:1: label -1 is out of range"),
        ("a.mp4,1\nb.mp4;2\n", "list.txt:2: expected 'path,label'"),
        ("a.mp4,x\n", "list.txt:1: the label is not an integer: 'x'"),
        ("\n \n", "list.txt: the list is empty"),
    ],
)
def test_lines_that_do_not_fit(write, text: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        read_list(write(text), num_classes=5)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_lists(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such list file"):
        read_list(tmp_path / "absent.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="cannot be read as a list"):
        read_list(tmp_path / "binary.txt")
    with pytest.raises(UserError, match="is a folder, not a list; `kineticlip prepare"):
        read_list(tmp_path)


def test_charades_training_rows_are_stretches(write) -> None:
    listed = read_list(
        write(
            "video_id,label,start_time,end_time,total_time\n"
            "46GP8,c092,11.90,21.20,24.83\n"
            "46GP8,c147,20.00,30.00,24.83\n"
            "AAAAA,c001,5.00,5.00,9.00\n",
            "train.csv",
        ),
        "frames",
        num_classes=157,
    )
    first, second = listed.entries
    assert (first.path, first.label, first.first) == ("frames/46GP8", 92, int(11.90 * 24))
    assert first.length == first.num_frames == int(21.20 * 24 - 11.90 * 24)
    assert second.length == int(24.83 * 24 - 20.0 * 24)  # the video ends first
    assert first.name != second.name
    assert listed.empty == ("AAAAA 5.00-5.00",)


def test_charades_test_rows_have_several_labels(write) -> None:
    header = "id,subject,script,actions,length\n"
    actions = "c092 11.90 21.20;c005 0.00 2.00;c092 1 2"
    rows = f'AB1,S1,"sits, then ""waves""",{actions},24.8\nCD2,S2,x,,9.1\n'
    listed = read_list(write(header + rows, "test.csv"))
    assert [entry.labels for entry in listed.entries] == [(5, 92), ()]
    assert {entry.label for entry in listed.entries} == {-1}
    with pytest.raises(UserError, match=r"test.csv:2: label 92 is out of range: expected 0..50"):
        read_list(write(header + rows, "test.csv"), num_classes=51)
    with pytest.raises(UserError, match=r"test.csv:2: expected a class like c092, got '92'"):
        read_list(write(header + "A,S,x,92 1 2,9\n", "test.csv"))


@pytest.mark.parametrize(
    "run", sorted(json.loads((GOLDEN / "text4vis/fewshot.json").read_text())["runs"])
)
def test_few_shot_is_the_official_selection(write, run: str) -> None:
    golden = json.loads((GOLDEN / "text4vis" / "fewshot.json").read_text())
    expected = golden["runs"][run]
    shots, seed = (int("".join(filter(str.isdigit, word))) for word in run.split("_"))
    entries = read_list(write("\n".join(golden["list_file"])), min_frames=8).entries
    assert len(entries) == expected["total_after_min8_filter"]
    once = few_shot(entries, shots, seed, repeat=False)
    assert [entry.name for entry in once] == expected["selected"]
    repeated = few_shot(entries, shots, seed)
    assert len(repeated) == expected["final_len"] == len(once) * expected["n_repeat"]
    names = [entry.name for entry in repeated]
    first = expected["first_after_repeat"]
    assert names[: len(first)] == first


def test_few_shot_depends_on_the_seed_and_needs_enough_videos(write) -> None:
    entries = read_list(write("".join(f"v{i} {i % 3}\n" for i in range(30)))).entries
    assert few_shot(entries, 2, 1) == few_shot(entries, 2, 1)
    assert few_shot(entries, 2, 1) != few_shot(entries, 2, 2)
    with pytest.raises(UserError, match=r"data.shots=11: class 0 has only 10 videos \(v0, ...\)"):
        few_shot(entries, 11, 0)


def test_lists_of_a_configuration(write) -> None:
    path = write("".join(f"v{i} {i} {i % 2}\n" for i in range(1, 21)))
    config = load_config(
        None,
        [f"data.{key}={value}" for key, value in {"train_list": path, "val_list": path}.items()]
        + ["data.train_root=t", "data.val_root=v", "data.min_frames=8", "data.shots=2"],
    )
    chosen = training_list(config, 2)
    assert len(chosen.short) == 7
    assert len({entry.name for entry in chosen.entries}) == 4
    assert len(chosen.entries) == 12
    scored = scoring_list(config, 2)
    assert len(scored.entries) == 20
    assert scored.entries[0].path == "v/v1"  # the official tests keep short videos,
    kept = scoring_list(override(config, ["data.val_min_frames=8"]), 2)  # its training does not
    assert len(kept.entries) == 13 and kept.short == chosen.short
    assert chosen.sha256 == scored.sha256
    for read in (training_list, scoring_list):
        with pytest.raises(UserError, match=r"data\.(train|val)_list is not set"):
            read(load_config(None), 2)
    with pytest.raises(UserError, match="no video is left to train on"):
        training_list(load_config(None, [f"data.train_list={path}", "data.min_frames=99"]), 2)


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("kinetics-400", 400, "abseiling", "zumba"),
        ("kinetics-600", 600, "abseiling", "zumba"),
        ("kinetics-600-split1", 160, "acting in play", "yarn spinning"),
        ("kinetics-600-split2", 160, "acting in play", "winking"),
        ("kinetics-600-split3", 160, "adjusting glasses", "wood burning (art)"),
        ("ucf101", 101, "ApplyEyeMakeup", "YoYo"),
        ("ucf101-split", 101, "Apply Eye Makeup", "Yo Yo"),
        ("hmdb51", 51, "brush hair", "wave"),
        ("activitynet", 200, "Applying sunscreen", "Zumba"),
    ],
)
def test_built_in_classes(name: str, count: int, first: str, last: str) -> None:
    names = read_labels(name)
    assert (len(names), len(set(names))) == (count, count)
    assert (names[0], names[-1]) == (first, last)
    assert all(label == label.strip() and label for label in names)


def test_built_in_sets() -> None:
    splits = {f"kinetics-600-split{number}" for number in (1, 2, 3)}
    others = {"ucf101", "ucf101-split", "hmdb51", "activitynet"}
    assert set(BUILT_IN) == {"kinetics-400", "kinetics-600"} | splits | others


def test_kinetics_600_splits_are_new_classes_in_alphabetical_order() -> None:
    old, full = read_labels("kinetics-400"), read_labels("kinetics-600")
    splits = [read_labels(f"kinetics-600-split{number}") for number in (1, 2, 3)]
    for names in (full, *splits):
        assert list(names) == sorted(names)
    for names in splits:
        assert set(names) <= set(full) and set(names).isdisjoint(old)
    assert len(set(splits[0]) & set(splits[1]) & set(splits[2])) > 60  # random draws of 160 of 220
    assert len(set().union(*splits)) == 217  # three of the 220 were never drawn
    # 368 of Kinetics-400's names live on, 12 under a new name, 20 are gone; 220 are new.
    assert (len(set(full) & set(old)), len(set(full) - set(old))) == (368, 232)


def test_kinetics_600_indices() -> None:
    """Official ones, as recorded by others: index-name pairs of a published model's output."""
    known = {"high kick": 211, "krumping": 250, "pumping fist": 388, "throwing snowballs": 531}
    names = read_labels("kinetics-600")
    assert {name: names.index(name) for name in known} == known


def test_built_in_order_is_the_official_one() -> None:
    ids = json.loads((GOLDEN / "vitaclip" / "data.json").read_text())["bpe_class_ids"]
    assert list(read_labels("kinetics-400")) == list(ids["k400"])
    assert [name.replace(" ", "_") for name in read_labels("hmdb51")] == list(ids["hmdb51"])
    ucf = read_labels("ucf101")
    known = {"HammerThrow": 35, "HandstandPushups": 36, "PoleVault": 67, "VolleyballSpiking": 96}
    assert {name: ucf.index(name) for name in known} == known
    assert split_words("CleanAndJerk") == "Clean And Jerk"


def test_label_files(write) -> None:
    table = write('id,name\n0,hurling (sport)\n1,"a, b"\n', "labels.csv")
    assert read_labels(table) == ("hurling (sport)", "a, b")
    assert read_labels(write("one\n\ntwo words\n", "names.txt")) == ("one", "two words")
    charades = write("c000 Holding some clothes\nc001 Closing a door\n", "classes.txt")
    assert read_labels(charades) == ("Holding some clothes", "Closing a door")
    assert read_labels(write("c000 a\nc002 b\n", "x.txt")) == ("c000 a", "c002 b")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("id,name\n0,a\n2,b\n", "x.csv:3: id '2' where 1 was expected"),
        ("id,name\n0,a\n1\n", "x.csv:3: expected 'id,name', got '1'"),
        ("id,name\n0,a\n1,a\n", "x.csv:3: class 'a' stands on line 2 too"),
        ("id,name\n", "x.csv: no class names in it"),
        ("a\nb\na\n", "x.csv:3: class 'a' stands on line 1 too"),
        ("", "x.csv: no class names in it"),
        ("0,a\n1,b\n", "x.csv:1: a CSV of classes begins with the header 'id,name'"),
    ],
)
def test_label_files_that_do_not_fit(write, text: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        read_labels(write(text, "x.csv"))
    assert problem in str(caught.value)


def test_unknown_label_source() -> None:
    with pytest.raises(UserError, match=r"kinetics400: no such .* Did you mean 'kinetics-400'\?"):
        read_labels("kinetics400")


def test_templates() -> None:
    assert render(TEMPLATES["text4vis"], ["ApplyEyeMakeup", "a {} b"]) == [
        "a video of a person ApplyEyeMakeup.",
        "a video of a person a {} b.",
    ]
    with pytest.raises(UserError, match=r"expected exactly one \{\}"):
        render("a video", ["x"])
    ensemble = ENSEMBLES["clip-kinetics"]
    assert (len(ensemble), len(set(ensemble))) == (28, 28)
    assert {"a photo of {}.", "a demonstration of a person practicing {}."} <= set(ensemble)
    assert not any("  " in template for template in ensemble)
    assert expand_templates(["bike", "clip-kinetics", "my {}"]) == (
        "This is a video about {}",
        *ensemble,
        "my {}",
    )
    with pytest.raises(UserError, match="Did you mean 'clip-kinetics'"):
        expand_templates(["clip-kinetic"])


STRETCHES = (
    "video_id,label,start_time,end_time,total_time\n"
    "46GP8,c092,11.90,21.20,24.83\n"
    "46GP8,c147,20.00,30.00,24.83\n"  # the video ends first
    "N11GT,c000,0.00,0.10,9.5\n"
)


def test_a_few_shot_list_of_stretches_holds_the_stretches(write, tmp_path: Path) -> None:
    """Not the whole videos, which the lines `path frames label` would name."""
    for rate in (24.0, 29.97):
        entries = read_list(write(STRETCHES, "rows.csv"), "r", rate=rate).entries
        pairs = [f"output={tmp_path / str(rate)}", f"data.frames_per_second={rate}"]
        path = write_few_shot(load_config(None, pairs), [*entries, *entries])
        assert read_list(path, "r", rate=rate).entries == entries
    assert "N11GT,c000,0.00,0.10,0.10\n" in path.read_text()


@pytest.mark.parametrize(
    "entry",
    [
        Entry('my "best" clip.mp4', "x", 1),
        Entry("a.mp4", "x", -1, labels=(1, 2)),
        Entry("two\nlines.mp4", "x", 1),
        Entry("a.mp4", "x", 1, num_frames=9, first=2, length=7),
        Entry("46GP8 1.00-2.00", "x", 1000, num_frames=24, first=24, length=24),
    ],
)
def test_what_no_line_says_is_refused_by_name(entry: Entry) -> None:
    with pytest.raises(UserError, match=re.escape(f"{entry.name!r}: no line")):
        list_text([entry])


def test_lists_are_written_as_they_are_read() -> None:
    def lines(*entries: Entry) -> str:
        return list_text(entries)

    assert lines(Entry("a.mp4", "r/a.mp4", 3), Entry("b c.mp4", "x", 0)) == (
        'a.mp4 3\n"b c.mp4" 0\n'
    )
    assert lines(Entry("v,1", "x", 3, num_frames=40)) == "v,1 40 3\n"
    assert lines(Entry("a.mp4", "x", -1), Entry("b,c.mp4", "x", -1)) == 'a.mp4\n"b,c.mp4"\n'
    assert lines() == ""


def test_only_a_word_in_place_of_a_number_may_be_a_header(write) -> None:
    with pytest.raises(UserError, match="label is not an integer: 'label'; if this is a header"):
        read_list(write("path label\n"))
    with pytest.raises(UserError, match="looks like a path and a label") as error:
        read_list(write("this;1\n"))
    assert "header" not in str(error.value)
    odd = "video_id,label,start_time,end_time,total_time\nA,'not an integer',0,1,2\n"
    with pytest.raises(UserError, match="expected a class like c092") as error:
        read_list(write(odd, "odd.csv"))
    assert "header" not in str(error.value)
