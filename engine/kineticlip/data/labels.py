"""The class names of a data set: built-in sets, label files, weights that carry them."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from importlib import resources
from pathlib import Path

from kineticlip.runtime.errors import UserError, did_you_mean


def read_text(path: str | Path, kind: str) -> tuple[str, str]:
    """(text, SHA-256 of the bytes)."""
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: no such {kind} file") from None
    except IsADirectoryError:
        raise UserError(
            f"{path}: is a folder, not a {kind}; `kineticlip prepare {path} --good list.txt "
            "--classes names.txt` writes one of it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a {kind}: {error}") from None


# name -> file of kineticlip/data; classes stand in the order of the official label indices.
BUILT_IN = {
    "kinetics-400": "kinetics-400.txt",
    "kinetics-600": "kinetics-600.txt",
    # The fixed zero-shot splits (ER-ZSAR, Chen and Huang 2021): 160 each of the 220 classes that
    # Kinetics-400 has under no name. In their alphabetical order, as in the published lists.
    "kinetics-600-split1": "kinetics-600-split1.txt",
    "kinetics-600-split2": "kinetics-600-split2.txt",
    "kinetics-600-split3": "kinetics-600-split3.txt",
    "ucf101": "ucf101.txt",  # official: ApplyEyeMakeup, one word
    "ucf101-split": "ucf101.txt",  # Apply Eye Makeup
    "hmdb51": "hmdb51.txt",
    "activitynet": "activitynet.txt",
}


def read_labels(source: str | Path) -> tuple[str, ...]:
    """The class names, index by index, of a built-in set or a file.

    A file is a CSV with the columns `id,name` (ids 0, 1, 2, ... in order), Charades' class file
    (`c000 Holding some clothes`), or holds one name a line. Names are kept to the letter. Raises
    UserError for an unknown source, a class without a name, ids out of order, a CSV without its
    header and a name that occurs twice. A trained weights file (.safetensors) carries the names
    of its classes.
    """
    name = str(source)
    if name in BUILT_IN:
        names = _built_in(BUILT_IN[name])
        return tuple(map(split_words, names)) if name == "ucf101-split" else names
    if not Path(source).exists():
        known = did_you_mean(name, BUILT_IN)
        raise UserError(f"{source}: no such label file or built-in set. {known}")
    if Path(source).suffix == ".safetensors":
        return _carried_names(source)
    lines = read_text(source, "label")[0].splitlines()
    first = next((line for line in lines if line.strip()), "")
    if [word.strip().lower() for word in first.split(",")] == ["id", "name"]:
        numbered = _csv_names(lines, source)
    else:
        numbered = _plain_names(lines, source)
    if not numbered:
        raise UserError(f"{source}: no class names in it")
    seen: dict[str, int] = {}
    for number, label in numbered:
        if label in seen:
            raise UserError(f"{source}:{number}: class {label!r} stands on line {seen[label]} too")
        seen[label] = number
    return tuple(seen)


def split_words(name: str) -> str:
    """`ApplyEyeMakeup` -> `Apply Eye Makeup`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)


def _built_in(file: str) -> tuple[str, ...]:
    text = (resources.files("kineticlip.data") / "class_names" / file).read_text(encoding="utf-8")
    return tuple(text.splitlines())


def _carried_names(source: str | Path) -> tuple[str, ...]:
    """The class names in the metadata of a weights file that training has written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="np") as file:
            facts = file.metadata() or {}
        names = tuple(map(str, json.loads(facts.get("class_names", "[]"))))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{source}: no weights that can be read: {error}") from None
    if not names:
        raise UserError(f"{source}: these weights carry no class names; give --labels a file")
    return names


def _plain_names(lines: list[str], source: str | Path) -> list[tuple[int, str]]:
    """One name a line; the codes of Charades come off."""
    rows = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if all(line.startswith(f"c{index:03d} ") for index, (_, line) in enumerate(rows)):
        return [(number, line.partition(" ")[2].strip()) for number, line in rows]
    if len(rows) > 1 and all(re.match(r"\d+\s*,", line) for _, line in rows):
        raise UserError(f"{source}:1: a CSV of classes begins with the header 'id,name'")
    return rows


def _csv_names(lines: list[str], source: str | Path) -> list[tuple[int, str]]:
    numbered: list[tuple[int, str]] = []
    reader = csv.reader(lines)
    rows = [(reader.line_num, row) for row in reader if any(word.strip() for word in row)]
    for number, row in rows[1:]:
        if len(row) != 2 or not row[1].strip():
            raise UserError(f"{source}:{number}: expected 'id,name', got {','.join(row)!r}")
        if row[0].strip() != str(len(numbered)):
            raise UserError(
                f"{source}:{number}: id {row[0].strip()!r} where {len(numbered)} was expected: "
                "ids are the class indices, 0, 1, 2, ... in order"
            )
        numbered.append((number, row[1].strip()))
    return numbered
