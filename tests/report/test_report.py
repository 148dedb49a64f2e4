"""The report: every number is the JSON's, every name is text, and nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import needs
from kineticlip.__main__ import main
from kineticlip.evaluation import metrics
from kineticlip.evaluation.results import read_results
from kineticlip.report import document as report_data
from kineticlip.report import page as report
from kineticlip.report import pictures as figures
from kineticlip.runtime.errors import UserError
from made_results import MACHINE, SPEED, make_run, orthogonal, text_like

NAMES = ["clapping", "waving", "riding a bike", "riding a horse", "eating", "running", "jumping"]
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\"quoted\" & 'apostrophes'",
    "{{ 7 * 7 }}",
    "b\u00e4r \u718a \U0001f43b \u0645\u0631\u062d\u0628\u0627",
    "]]>--><!--",
]
VOID = {"meta", "img", "input", "link", "br", "hr"}


class Page(HTMLParser):
    """What the tests ask of a page: numbers with their paths, texts, elements, balance."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.numbers: list[tuple[str, str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.stack: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.stack == [], f"not closed: {self.stack}"
        self.data: Any = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self.stack.pop()
        assert opened == tag, f"</{tag}> closes <{opened}> at line {self.getpos()[0]}"

    def handle_data(self, data: str) -> None:
        tag, attributes = self.stack[-1] if self.stack else ("", {})
        if tag == "script":
            self.scripts.append(data)
        elif tag != "style" and data.strip():
            self.texts.append(data.strip())
            if "data-path" in attributes:
                self.numbers.append((attributes["data-path"] or "", data.strip()))

    def count(self, tag: str, **wanted: str) -> int:
        return sum(
            name == tag and all(attributes.get(k) == v for k, v in wanted.items())
            for name, attributes in self.elements
        )


def page_of(*folders: Path, title: str | None = None) -> Page:
    return Page(report.render([read_results(folder) for folder in folders], title=title))


def resolve(document: Any, path: str) -> Any:
    for key in path.split("."):
        document = document[int(key)] if isinstance(document, list) else document[key]
    return document


def check_numbers(page: Page) -> None:
    for path, text in page.numbers:
        value = resolve(page.data, path)
        if value is None:
            assert text == "\N{EN DASH}", path
            continue
        written = text.replace(",", "").replace("\N{MINUS SIGN}", "-")
        decimals = len(written.partition(".")[2])
        assert abs(float(written) - value) <= 0.5000001 * 10**-decimals, (path, text, value)
        assert decimals or float(written) == round(value), (path, text, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results") / "everything"
    make_run(
        root, NAMES, videos=90, skill=1.0, bad_every=20, clips=5, classifier=text_like(NAMES),
        speed=SPEED, extra={"mean_average_precision": 61.25, "half": {"mean": 70.5, "std": 2.0}},
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return page_of(folder, title="A title")


def test_every_number_is_the_one_of_the_json(page: Page) -> None:
    check_numbers(page)
    paths = {path for path, _ in page.numbers}
    for number in range(len(NAMES)):
        assert f"runs.0.per_class.{number}.accuracy" in paths
    for wanted in ("top1", "top1_interval.0", "top1_interval.1", "top5", "mean_class_accuracy"):
        assert f"runs.0.summary.{wanted}" in paths
    for wanted in ("clips.4.top.4.percent", "waits.3.percent", "classifier.pairs.0.cosine"):
        assert f"runs.0.{wanted}" in paths
    counts = [path for path in paths if ".confusion." in path]
    assert len(counts) == len(page.data["runs"][0]["confusion"])


def test_the_json_is_the_one_of_the_files(folder: Path, page: Page) -> None:
    run, results = page.data["runs"][0], read_results(folder)
    stored = json.loads((folder / "summary.json").read_text())
    assert run["class_names"] == stored.pop("class_names") == NAMES
    assert run["summary"] == stored
    scored = [row for row in results.rows if row.status == "ok"]
    for entry in run["per_class"]:
        mine = [row for row in scored if row.label == entry["class"]]
        assert entry["videos"] == len(mine)
        assert entry["correct"] == sum(row.correct for row in mine)
        assert entry["accuracy"] == pytest.approx(100 * entry["correct"] / len(mine))
        wrong = [row.prediction for row in mine if not row.correct]
        assert entry["mistaken_count"] == wrong.count(entry["mistaken_for"])
        assert all(wrong.count(other) <= entry["mistaken_count"] for other in wrong)
    for truth, prediction, count in run["confusion"]:
        assert count == sum((r.label, r.prediction) == (truth, prediction) for r in scored)
    assert sum(count for _, _, count in run["confusion"]) == len(scored)
    for pair in run["pairs"]:
        assert [pair["truth"], pair["prediction"], pair["count"]] in run["confusion"]
        assert pair["share"] == pytest.approx(
            100 * pair["count"] / run["per_class"][pair["truth"]]["videos"]
        )
    shares = [mistake["percent"] for mistake in run["mistakes"]]
    assert shares == sorted(shares, reverse=True) and len(shares) == report_data.MAX_MISTAKES
    assert [entry["video"] for entry in run["bad"]] == [
        row.video for row in results.rows if row.status == "bad"
    ]


def test_facts_are_written_as_they_are(page: Page) -> None:
    for value in (*MACHINE.values(), *MACHINE["software"].values(), "61.25", "70.5"):
        if not isinstance(value, dict):
            assert str(value) in page.texts


def test_nothing_is_loaded_and_only_the_page_s_script_runs(folder: Path, page: Page) -> None:
    text = report.render([read_results(folder)])
    assert not re.search(r"https?://|@import|url\(", text)
    for _, attributes in page.elements:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), value
        assert not any(name.startswith("on") for name in attributes)
    assert page.count("script") == 2 and page.count("link") == 0
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    policy = next(a["content"] for t, a in page.elements if "http-equiv" in a)
    assert f"script-src 'sha256-{digest}'" in str(policy) and "default-src 'none'" in str(policy)


def test_page_can_be_read_without_seeing_it(page: Page) -> None:
    for tag, attributes in page.elements:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-labelledby"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert page.count("html", lang="en") == 1 and page.count("h1") == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in ids


def test_names_are_text_whatever_they_say(tmp_path: Path) -> None:
    summary = make_run(
        tmp_path / "<i>run", HOSTILE, videos=60, skill=0.5, bad_every=9, clips=6,
        classifier=text_like(HOSTILE), extra={"<b>": "</script>"}, weights="<u>weights",
    )  # fmt: skip
    page = page_of(tmp_path / "<i>run", title="<title> & </title>")
    check_numbers(page)
    assert page.count("script") == 2 and page.count("i", id="run") == 0
    assert page.count("img") == len(page.data["runs"][0]["clips"])
    assert page.data["runs"][0]["class_names"] == HOSTILE == summary["class_names"]
    for name in (*HOSTILE, "<title> & </title>", "<b>", "</script>", "<u>weights"):
        assert name in page.texts


@pytest.mark.parametrize("count", [1, 2, 12, 48, 49])
def test_any_number_of_classes_is_drawn(tmp_path: Path, count: int) -> None:
    names = [f"class number {number}" for number in range(count)]
    make_run(tmp_path, names, videos=2 * count, classifier=text_like(names))
    page = page_of(tmp_path)
    check_numbers(page)
    drawn = page.count("svg", **{"data-matrix": "confusion"})
    assert drawn == page.count("svg", **{"data-matrix": "classifier"}) == (count > 1)
    labelled = sum(tag == "text" for tag, _ in page.elements)
    assert bool(labelled) == (1 < count <= report_data.MAX_LABELLED)
    assert (page.data["runs"][0]["histogram"] is not None) == (count >= 20)


def test_empty_and_all_bad_results_have_a_page(tmp_path: Path) -> None:
    make_run(tmp_path / "empty", NAMES, videos=0)
    make_run(tmp_path / "bad", NAMES, videos=30, bad_every=1)
    for name, bad in (("empty", 0), ("bad", 30)):
        page = page_of(tmp_path / name)
        check_numbers(page)
        assert "No video could be scored." in page.texts
        assert page.data["runs"][0]["summary"]["bad"] == bad
        assert len(page.data["runs"][0]["bad"]) == bad


def test_untrained_weights_are_announced(tmp_path: Path, page: Page) -> None:
    make_run(tmp_path, NAMES, videos=7, weights="untrained (seed 0)")
    assert "Untrained weights." in page_of(tmp_path).texts
    assert "Untrained weights." not in page.texts


def test_large_results_make_a_page_of_modest_size(tmp_path: Path) -> None:
    names = [f"doing the thing number {number}" for number in range(400)]
    make_run(tmp_path, names, videos=2000, bad_every=8, clips=3, classifier=text_like(names))
    text = report.render([read_results(tmp_path)])
    assert len(text) < 1_500_000
    page = Page(text)
    check_numbers(page)
    run = page.data["runs"][0]
    assert len(run["bad"]) == report_data.MAX_BAD < run["summary"]["bad"] == 250
    assert any(str(report_data.MAX_BAD) in text and "listed" in text for text in page.texts)


def test_clips_stay_within_their_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = len((folder / "thumbnails" / "0.jpg").read_bytes()) * 4 // 3 + 40
    monkeypatch.setattr(report, "MAX_CLIP_BYTES", int(2.5 * one))
    assert len(page_of(folder).data["runs"][0]["clips"]) == 2


def test_same_files_give_the_same_bytes(folder: Path) -> None:
    assert report.render([read_results(folder)]) == report.render([read_results(folder)])


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("compared")
    made: dict[str, dict[str, Any]] = {
        "text-seen": {"skill": 2.0, "classifier": text_like(NAMES)},
        "text-kept_out": {"skill": 1.5, "seed": 3},
        "orthogonal-seen": {"skill": 0.5, "seed": 4, "classifier": orthogonal(7), "speed": SPEED},
    }
    for name, options in made.items():
        names = NAMES[:3] if "kept_out" in name else NAMES
        make_run(root / name, names, videos=70, bad_every=11, **options)
    return [root / name for name in made]


def test_runs_are_compared_side_by_side(compared: list[Path]) -> None:
    page = page_of(*compared)
    check_numbers(page)
    runs = page.data["runs"]
    assert [run["name"] for run in runs] == [path.name for path in compared]
    assert runs[0]["difference"] is None and runs[1]["difference"] is None
    assert page.count("details", **{"class": "run"}) == 3
    assert page.count("figure", **{"class": "map"}) == 2
    paths = {path for path, _ in page.numbers}
    assert {f"runs.{n}.summary.top1" for n in range(3)} <= paths
    difference = runs[2]["difference"]
    first, third = (read_results(compared[n]).rows for n in (0, 2))
    change = [
        int(b.correct) - int(a.correct)
        for a, b in zip(first, third, strict=True)
        if a.status == b.status == "ok"
    ]
    assert difference["against"] == 0 and difference["videos"] == len(change) == 64
    assert difference["points"] == pytest.approx(100 * np.mean(change))
    assert difference["interval"] == list(metrics.bootstrap_interval(change))
    assert difference["interval"][1] < 0


def test_runs_of_the_same_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / folder.name)
    names = [run["name"] for run in page_of(folder, other).data["runs"]]
    assert names == [str(folder), str(other)]
    twice = [run["name"] for run in page_of(folder, folder).data["runs"]]
    assert twice == [f"{folder} (1)", f"{folder} (2)"]


def test_command_writes_the_page(
    compared: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "page.html"
    assert main(["report", *map(str, compared), "--out", str(out), "--title", "All three"]) == 0
    assert str(out) in capsys.readouterr().out
    assert "All three" in Page(out.read_text(encoding="utf-8")).texts
    assert main(["report", str(compared[0])]) == 0
    assert (compared[0] / "report.html").is_file()


def test_mistakes_of_the_caller_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "journal.jsonl").write_text("")
    for arguments, message in (
        (["nowhere"], "nowhere: no such results folder"),
        ([str(tmp_path / "unfinished")], "its evaluation has not finished"),
        ([str(folder), "--out", str(tmp_path)], "is a folder; --out names the HTML file"),
        ([str(folder), "--out", "/dev/null/page.html"], "cannot be written"),
    ):
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file": "../summary.json"}, "'../summary.json' is not a file name of this folder"),
        ({"file": "9.jpg"}, r"9\.jpg: cannot be read: No such file"),
        ({"file": "index.json"}, r"index\.json: not a JPEG"),
        ({"video": "other.mp4"}, r"other\.mp4 is not in the results"),
    ],
)
def test_broken_thumbnails_are_named(
    folder: Path, tmp_path: Path, entry: dict[str, str], message: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((copy / "thumbnails" / "index.json").read_text())
    index[1] |= entry
    (copy / "thumbnails" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        report.render([read_results(copy)])


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_confusion_picture_has_a_pixel_a_pair() -> None:
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 5]])
    picture = pixels(figures.confusion_picture(counts))
    assert picture.shape == (3, 3, 4)
    assert picture[0, 0].tolist() == [*figures.RIGHT, round(255 * 0.75**0.5)]
    assert picture[0, 1].tolist() == [*figures.WRONG, round(255 * 0.25**0.5)]
    assert picture[2, 2].tolist() == [*figures.RIGHT, 255]
    assert picture[1, :, 3].tolist() == [0, 0, 0]


def test_cosine_picture_follows_the_ramp() -> None:
    picture = pixels(figures.cosine_picture(np.array([[1.0, -0.5], [0.2, 0.1]])))
    assert picture[0].tolist() == [list(figures.RAMP[-1]), list(figures.RAMP[0])]
    assert picture[1, 0].tolist() == list(figures.RAMP[1])
    between = (np.array(figures.RAMP[0]) + np.array(figures.RAMP[1])) / 2
    assert picture[1, 1].tolist() == np.round(between).tolist()
    lightness = np.array(figures.RAMP) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()


def test_cosines_of_text_and_orthogonal_rows() -> None:
    text, drawn = report_data.cosines_of(text_like(NAMES)), report_data.cosines_of(orthogonal(7))
    assert np.allclose(drawn, np.eye(7), atol=1e-6)
    bike, horse, eating = (NAMES.index(n) for n in ("riding a bike", "riding a horse", "eating"))
    assert text[bike, horse] > text[bike, eating] > 0.3
    assert np.isfinite(report_data.cosines_of(np.zeros((2, 3), dtype=np.float32))).all()


PROBE = """<script>
const head = document.querySelector("table.sortable thead button");
head.click();
document.title = JSON.stringify({
  first: document.querySelector("table.sortable tbody th").textContent,
  sorted: head.parentElement.ariaSort,
  readouts: document.querySelectorAll(".readout:not([hidden])").length,
  sideways: document.documentElement.scrollWidth > document.documentElement.clientWidth,
});
</script>"""


@pytest.mark.needs_chromium
def test_script_works_in_a_browser(folder: Path, tmp_path: Path) -> None:
    text = report.render([read_results(folder)])
    pages = {"as_it_is": text, "probed": re.sub("<meta http-equiv[^>]*>", "", text) + PROBE}
    doms = {}
    for name, content in pages.items():
        path = tmp_path / f"{name}.html"
        path.write_text(content, encoding="utf-8")
        doms[name] = subprocess.run(
            [
                needs.browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--no-first-run", "--disable-background-networking", "--disable-component-update",
                "--disable-sync", f"--user-data-dir={tmp_path / name}", "--window-size=500,900",
                "--dump-dom", path.as_uri(),
            ],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
    assert doms["as_it_is"].count("<button>") == 5  # its own policy lets its own script run
    title = re.search("<title>(.*?)</title>", doms["probed"])
    assert title is not None
    seen = json.loads(title.group(1))
    assert seen == {
        "first": sorted(NAMES)[0],
        "sorted": "ascending",
        "readouts": 2,
        "sideways": False,
    }
