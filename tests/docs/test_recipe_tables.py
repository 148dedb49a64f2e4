"""The tables that docs/build.py writes are those of the recipes as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "build.py"


def test_generated_tables_are_current() -> None:
    ran = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_every_recipe_has_a_row_with_its_published_figure() -> None:
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| [")]
    recipes = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert [row[0].split("]")[0].removeprefix("| [") for row in rows] == recipes
    for row in rows:
        assert "top-1" in row[-1] or row[0].startswith("| [demo-"), row[0]
