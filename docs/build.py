"""Writes the generated tables of README.md and configs/README.md; --check fails where one is stale.

    python docs/build.py            make docs
    python docs/build.py --check    make docs-check

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, and is made from the recipes alone.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
DATASETS = {
    "k400": "Kinetics-400",
    "k600": "Kinetics-600",
    "ssv2": "Something-Something v2",
    "ucf101": "UCF101",
    "hmdb51": "HMDB51",
    "demo": "the demo's own clips",
}
# recipe -> giga multiply-adds that the paper prints for one view (they leave attention's out)
PRINTED = {
    "k400-text4vis-vitb32-f8": "23.7",
    "k400-text4vis-vitb16-f8": "90.3",
    "k400-text4vis-vitl14-f8": "415.4",
    "k400-text4vis-vitl14_336-f32": "3829",
}


def header_of(recipe: Path) -> str:
    """The comment lines above a recipe as one line of text."""
    lines = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return " ".join(filter(None, lines))


def published(recipe: Path) -> str:
    """What the header says was published; empty where nothing was."""
    header = re.sub(r"(?<=\w)- (?=\w)", "-", header_of(recipe))  # words broken between lines
    sentences = re.split(r"(?<=[A-Za-z)%])\. +(?=[A-Z0-9])", header)
    found = next((s for s in sentences if s.startswith("Published")), "")
    return re.sub(r"^Published[,:]? ?", "", found).rstrip(". ")


def recipe_rows() -> Iterator[list[str]]:
    yield ["recipe", "method", "data set", "trunk", "frames", "px", "published"]
    for recipe in RECIPES:
        values: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        data = values["data"]
        yield [
            f"[{recipe.stem}]({recipe.name})",
            values["method"],
            DATASETS[recipe.stem.split("-")[0]],
            values["model"]["arch"],
            str(data["num_frames"]),
            str(data["resolution"]),
            published(recipe),
        ]


def cost_rows() -> Iterator[list[str]]:
    """Giga multiply-adds of one view, as `kineticlip info` counts them."""
    from kineticlip.__main__ import main

    yield ["recipe", "engine", "official code", "the paper prints"]
    for name, printed in PRINTED.items():
        totals = _json_of(main, ["info", name, "--json"])["totals"]
        engine, official = (f"{totals[key] / 1e9:.2f} G" for key in ("ours", "official"))
        yield [f"`{name}`", engine, official, f"{printed} G"]


def _json_of(main: Callable[[list[str]], int], words: list[str]) -> Any:
    import contextlib
    import io
    import json

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0
    return json.loads(out.getvalue())


def table(rows: Iterator[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def between(made: str, marks: re.Match[str]) -> str:
    return f"{marks[1]}{made}{marks[2]}"


BLOCKS = (
    ("configs/README.md", "recipes", recipe_rows),
    ("README.md", "costs", cost_rows),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a table is stale")
    check = parser.parse_args().check
    stale = []
    for file, name, rows in BLOCKS:
        path = ROOT / file
        before = path.read_text(encoding="utf-8")
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.S)
        assert len(pattern.findall(before)) == 1, f"{file}: no block {name}"
        made = table(rows())
        after = pattern.sub(partial(between, made), before)
        if after != before:
            stale.append(f"{file}: {name}")
            if not check:
                path.write_text(after, encoding="utf-8")
    for line in stale:
        print(f"{line}: {'stale; make docs writes it' if check else 'written'}", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
