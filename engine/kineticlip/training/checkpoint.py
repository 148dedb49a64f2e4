"""Checkpoints that are either whole or not there, and the weights that a run hands on.

DeepSpeed's own `latest` is no commit mark: it may name a folder with shards missing (measured by
killing rank 0 while rank 1 still wrote). Here a folder is written under a temporary name, synced,
given a MANIFEST.json with the size and checksum of every file, and renamed; nothing else counts.

Loading a checkpoint runs pickles of DeepSpeed's: resume only from folders of your own runs. The
exported weights are safetensors and hold no code.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch

from kineticlip.config import Config, config_to_dict
from kineticlip.runtime.distributed import Ranks, barrier
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import move, sync, write_atomic
from kineticlip.runtime.journal import dump_json
from kineticlip.runtime.version import __version__

MANIFEST = "MANIFEST.json"
FORMATS = (1, 2)  # of checkpoints that this version goes on from
LATEST = "latest"  # for people and scripts; resuming reads the manifests
_FOLDER = re.compile(r"step-\d{8}")
# What may change between the two halves of a run: where it writes and how often, and evaluation.
_FREE = {
    "": {"name", "output", "test", "eval"},
    "data": {"val_list", "val_root", "workers", "probe_cache"},
    "train": {"checkpoint_every", "keep_checkpoints", "eval_every", "log_every"}
    | {"max_skipped_steps"},
}

Save = Callable[[Path, str], None]  # (folder, tag): every rank writes its shards to folder/tag


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: optimiser steps done (or skipped), micro-batches seen by each process.

    epoch_length: micro-batches of an epoch, without which a position means nothing.
    """

    step: int = 0
    position: int = 0
    skipped: int = 0
    epoch_length: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a committed checkpoint says about itself. files: name -> [bytes, crc32].

    format: 2 where ZeRO's buffers hold parameters in the order of engine.aligned_groups, 1 where
    they hold them in the methods' own order, as checkpoints did at first.
    """

    progress: dict[str, int]
    world_size: int
    config_hash: str
    config: dict[str, Any]
    files: dict[str, list[int]]
    versions: dict[str, str] = field(default_factory=dict)
    written: str = ""
    format: int = 2


def identity(config: Config) -> dict[str, Any]:
    """The part of a config that fixes what a run computes, as plain data."""
    plain = config_to_dict(config)
    kept = {key: value for key, value in plain.items() if key not in _FREE[""]}
    for section in ("data", "train"):
        kept[section] = {k: v for k, v in kept[section].items() if k not in _FREE[section]}
    return kept


def config_hash(config: Config) -> str:
    """SHA-256 of a config's identity."""
    canonical = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key is 1 there and 2 here` for every leaf that differs; `there` comes from JSON."""
    found = []
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} is {old!r} there and {new!r} here")
    return found


def committed(folder: Path) -> list[Path]:
    """Checkpoints under a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _FOLDER.fullmatch(path.name))


def commit(
    folder: Path,
    save: Save,
    *,
    progress: Progress,
    config: Config,
    ranks: Ranks,
    keep: int,
    aligned: bool = True,
) -> Path:
    """Writes the checkpoint of all ranks, then all but the newest `keep` are deleted.

    Every rank calls it, right after an optimiser step. A kill at any moment leaves the previous
    checkpoints as they were. aligned: the engine's layout (Manifest.format). Raises UserError on
    rank 0 where shards are missing after the save: the nodes do not share the folder.
    """
    name = f"step-{progress.step:08d}"
    temporary = folder / f".tmp-{name}"
    if ranks.is_first:
        _delete_leftovers(folder)
    barrier()
    save(folder, temporary.name)
    torch.save({"random": random_state()}, temporary / _rank_file(ranks.rank))
    barrier()
    if ranks.is_first:
        missing = [
            _rank_file(rank)
            for rank in range(ranks.world_size)
            if not (temporary / _rank_file(rank)).is_file()
        ]
        if missing:
            raise UserError(
                f"{folder}: {', '.join(missing)} of other processes are missing; "
                "checkpoints need a folder that all nodes share"
            )
        _seal(temporary, progress, config, ranks, aligned=aligned)
        if (folder / name).exists():  # the same step, committed before a resume from an older one
            _delete(folder / name)
        move(temporary, folder / name)
        write_atomic(folder / LATEST, f"{name}\n".encode())
        for old in committed(folder)[:-keep]:
            _delete(old)
    barrier()
    return folder / name


def _seal(
    temporary: Path, progress: Progress, config: Config, ranks: Ranks, *, aligned: bool
) -> None:
    """Syncs every file of a folder and writes its manifest."""
    files = {}
    for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
        files[path.relative_to(temporary).as_posix()] = [path.stat().st_size, _checksum(path)]
        sync(path)
    import deepspeed

    manifest = Manifest(
        progress=asdict(progress),
        world_size=ranks.world_size,
        config_hash=config_hash(config),
        config=identity(config),
        files=files,
        versions={
            "kineticlip": __version__,
            "torch": str(torch.__version__),
            "deepspeed": str(deepspeed.__version__),
        },
        written=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        format=2 if aligned else 1,
    )
    write_atomic(temporary / MANIFEST, dump_json(asdict(manifest), indent=1))
    sync(temporary)


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of one checkpoint folder, its files checked against it to the byte.

    Raises UserError for a folder without a manifest, and for a file that is missing or changed.
    """
    try:
        manifest = Manifest(**json.loads((checkpoint / MANIFEST).read_bytes()))
    except FileNotFoundError:
        raise UserError(f"{checkpoint}: no checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(checkpoint, f"{MANIFEST} cannot be read: {error}") from None
    if manifest.format not in FORMATS:
        raise UserError(
            f"{checkpoint}: format {manifest.format}, and this version reads {FORMATS}; it takes "
            "a newer one"
        )
    for name, (size, checksum) in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():
            raise _damaged(checkpoint, f"{name} is missing")
        if path.stat().st_size != size:
            raise _damaged(checkpoint, f"{name} has {path.stat().st_size} bytes, not {size}")
        if _checksum(path) != checksum:
            raise _damaged(checkpoint, f"{name} was changed")
    return manifest


def _damaged(checkpoint: Path, why: str) -> UserError:
    return UserError(
        f"{checkpoint}: damaged: {why}; move it away to resume from the checkpoint before it"
    )


def find_resumable(resume: str, output: Path, config: Config, ranks: Ranks) -> Path | None:
    """The checkpoint to go on from, checked; None where the run starts at its beginning.

    resume: `auto` takes the newest checkpoint of `output`, `never` none, else it is the path of
    a checkpoint or of a run. Raises UserError for a damaged checkpoint, one of another config or
    number of processes, a path without one, and where `never` would write over a run.
    """
    own = output / "checkpoints"
    if resume == "never":
        if (output / "metrics.jsonl").exists() or committed(own):
            raise UserError(f"{output}: already holds a run; choose another output folder")
        return None
    if resume == "auto":
        found = committed(own)
        if not found and (own / LATEST).exists():
            raise UserError(f"{own}: names a latest checkpoint but holds none; move it away")
        chosen = found[-1] if found else None
    else:
        chosen = _named(Path(resume))
        newer = [path for path in committed(own) if path.name > chosen.name]
        if newer:
            raise UserError(
                f"{own}: holds {newer[-1].name}, newer than {chosen}; "
                "move it away, or choose another output"
            )
    if chosen is not None and ranks.is_first:  # one reader of every byte is enough
        check_belongs(read_manifest(chosen), chosen, config, ranks)
    barrier()
    return chosen


def _named(path: Path) -> Path:
    """A checkpoint folder itself, or the newest of a run's folder."""
    if _FOLDER.fullmatch(path.name) and path.is_dir():
        return path
    found = committed(path) or committed(path / "checkpoints")
    if not found:
        raise UserError(f"--resume {path}: neither a checkpoint nor a run that has one")
    return found[-1]


def check_belongs(manifest: Manifest, checkpoint: Path, config: Config, ranks: Ranks) -> None:
    """UserError unless the checkpoint is this run's: same config, same number of processes."""
    if manifest.config_hash != config_hash(config):
        here = json.loads(json.dumps(identity(config)))
        changed = "; ".join(differences(manifest.config, here)[:3])
        raise UserError(f"{checkpoint}: belongs to another config: {changed}")
    if manifest.world_size != ranks.world_size:
        raise UserError(
            f"{checkpoint}: written by {manifest.world_size} processes, this run has "
            f"{ranks.world_size}; start as many (a shard is one process's, and so is its data)"
        )


def is_aligned(checkpoint: Path) -> bool:
    """Whether a checked checkpoint has the layout that new runs have (Manifest.format)."""
    return Manifest(**json.loads((checkpoint / MANIFEST).read_bytes())).format > 1


def load(checkpoint: Path, engine: Any, ranks: Ranks) -> Progress:
    """Restores a fresh engine and this rank's random state from a checked checkpoint."""
    manifest = Manifest(**json.loads((checkpoint / MANIFEST).read_bytes()))
    found, _ = engine.load_checkpoint(
        str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False
    )
    assert found is not None, "DeepSpeed warns and goes on from scratch where it finds nothing"
    state = torch.load(checkpoint / _rank_file(ranks.rank), weights_only=True)
    restore_random_state(state["random"])
    return Progress(**manifest.progress)


def random_state() -> dict[str, Any]:
    """The four generators a training process may draw from, as plain data and byte tensors."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = dict(state["numpy"])
    words = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": words}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _delete(checkpoint: Path) -> None:
    """Renames first: a kill in the middle leaves no half-empty folder of a committed name."""
    doomed = checkpoint.with_name(f".tmp-{checkpoint.name}-deleted")
    checkpoint.rename(doomed)
    rmtree(doomed)


def _delete_leftovers(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp-*"):
        rmtree(leftover)
