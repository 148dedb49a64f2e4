"""One self-contained HTML page from results folders: no network, no framework, no measuring.

The page embeds its document (`document`) as JSON and takes every number from it; the number's
element names its place in `data-path`. Names come from users and are escaped everywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from kineticlip.evaluation.results import PICTURES, THUMBNAILS, Results, read_results
from kineticlip.report.document import (
    MAX_LABELLED,
    build_document,
    cosines_of,
    describe_clip,
    flatten,
)
from kineticlip.report.pictures import confusion_picture, cosine_picture, ramp_css
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_atomic
from kineticlip.runtime.journal import Json

TEMPLATES = Path(__file__).parent / "templates"

# Pictures of clips are most of the page; these keep it in mail size.
MAX_CLIPS = 24  # of one run
MAX_CLIP_BYTES = 4_000_000  # of all runs together

# How a number is written, by the style its place asks for. A rounded -0.0 is written as 0.0.
STYLES: Mapping[str, Callable[[Any], str]] = {
    "percent": lambda value: f"{round(value, 1) + 0.0:.1f}",
    "integer": lambda value: f"{value:,}",
    "rate": lambda value: f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}",
    "cosine": lambda value: _signed(f"{round(value, 3) + 0.0:.3f}"),
    "points": lambda value: _signed(f"{round(value, 1) + 0.0:+.1f}"),
}
MISSING = "\N{EN DASH}"


def write_report(
    folders: Sequence[str | Path], out: str | Path | None = None, *, title: str | None = None
) -> Path:
    """Writes the page of one or several results folders; default place: report.html in the first.

    Raises UserError for folders that are missing, unfinished or malformed.
    """
    runs = [read_results(folder) for folder in folders]
    target = Path(out) if out else runs[0].folder / "report.html"
    if target.is_dir():
        raise UserError(f"{target}: is a folder; --out names the HTML file to write")
    write_atomic(target, render(runs, title=title).encode("utf-8"))
    return target


def render(runs: Sequence[Results], *, title: str | None = None) -> str:
    """The page as HTML. The same result files give the same bytes."""
    document = build_document(
        runs, title=title or " \N{MIDDLE DOT} ".join(run.name for run in runs)
    )
    pictures = []
    for run, described in zip(runs, document["runs"], strict=True):
        budget = MAX_CLIP_BYTES // len(runs)
        described["clips"], clips = _clips(run, budget)
        pictures.append({"clips": clips, **_matrices(run, described)})
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    environment = _environment(document)
    return environment.get_template("report.html.j2").render(
        document=document,
        pictures=pictures,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_embedded(document),
        ramp=ramp_css(),
        max_labelled=MAX_LABELLED,
    )


def _environment(document: Json) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def number(path: str, style: str, tag: str = "span", attributes: str = "") -> Markup:
        """The document's number at a dotted path, in an element that names the path."""
        value = _resolve(document, path)
        text = MISSING if value is None else STYLES[style](value)
        return Markup('<{0}{1} data-path="{2}">{3}</{0}>').format(
            Markup(tag), Markup(f" {attributes}" if attributes else ""), path, text
        )

    environment.globals["number"] = number
    environment.filters["shorten"] = _shorten
    environment.filters["plain"] = _plain
    environment.filters["flatten"] = flatten
    environment.filters["lowest_first"] = _lowest_first
    environment.filters["without"] = lambda mapping, *keys: {
        name: value for name, value in mapping.items() if name not in keys
    }
    environment.filters["counted"] = lambda count, word: f"{count} {word}{'s' * (count != 1)}"
    environment.filters["written"] = lambda value, style: STYLES[style](value)
    return environment


def _resolve(document: Any, path: str) -> Any:
    value = document
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def _embedded(document: Json) -> Markup:
    """JSON that no HTML parser can leave: <, > and & are written as escapes."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _matrices(run: Results, described: Json) -> Json:
    count = len(described["class_names"])
    confusion = np.zeros((count, count), dtype=np.int64)
    for truth, prediction, videos in described["confusion"]:
        confusion[truth, prediction] = videos
    classifier = run.classifier()
    return {
        "confusion": confusion_picture(confusion) if count else None,
        "classifier": None if classifier is None else cosine_picture(cosines_of(classifier)),
    }


def _clips(run: Results, budget: int) -> tuple[list[Json], list[str]]:
    """Described clips and their pictures as data URIs, as many as the budget of bytes allows."""
    rows = {row.video: row for row in run.rows}
    clips: list[Json] = []
    pictures: list[str] = []
    for entry in run.thumbnails()[:MAX_CLIPS]:
        row = rows.get(entry["video"])
        if row is None:
            raise UserError(
                f"{run.folder / THUMBNAILS / PICTURES}: {entry['video']} is not in the results"
            )
        picture = _read_picture(run.folder / THUMBNAILS, entry["file"])
        budget -= len(picture)
        if budget < 0:
            break
        frames = entry.get("frames", 1)
        clips.append(describe_clip(row, len(frames) if isinstance(frames, list) else int(frames)))
        pictures.append(picture)
    return clips, pictures


def _read_picture(folder: Path, name: str) -> str:
    path = folder / name
    if Path(name).name != name:
        raise UserError(f"{folder / PICTURES}: '{name}' is not a file name of this folder")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not data.startswith(b"\xff\xd8\xff"):
        raise UserError(f"{path}: not a JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def _plain(value: Any) -> str:
    """A value of the provenance tables as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False)


def _lowest_first(per_class: Sequence[Json]) -> list[Json]:
    """Classes by accuracy, those without videos last."""
    return sorted(
        per_class,
        key=lambda entry: (entry["accuracy"] is None, entry["accuracy"] or 0.0, entry["class"]),
    )
