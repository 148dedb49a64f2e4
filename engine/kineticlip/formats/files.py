"""Files that hold tensors: safetensors, torch.save, TorchScript; read without trusting them."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kineticlip.formats.torchscript import is_torchscript, read_torchscript
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_whole

Tensors = dict[str, Tensor]
Kind = Literal["safetensors", "torch", "torchscript"]
# What torch.load raises for bytes that are not its own, or that hold more than plain data.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError,
    TypeError, OSError,
)  # fmt: skip
_MAX_DEPTH = 16  # optimiser states, the deepest real case, need 5


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A file taken apart: tensors by dotted path, and the plain values beside them.

    `module.`, which DistributedDataParallel puts before names, is gone from every path.
    """

    kind: Kind
    tensors: Tensors
    values: dict[str, Any] = field(default_factory=dict)  # epoch, step, safetensors metadata


def read_contents(path: str | Path) -> Contents:
    """Reads any of the three containers; tensors keep their dtype and may be memory-mapped.

    Raises UserError for a missing, damaged or foreign file, and for a pickle that holds objects.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the checkpoint file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    if _looks_like_safetensors(path):
        return _read_safetensors(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if is_torchscript(archive):
                return Contents(kind="torchscript", tensors=_named(read_torchscript(path), path))
    return _read_torch(path)


def _looks_like_safetensors(path: Path) -> bool:
    """A little-endian header length, then a JSON object; the suffix decides a damaged header."""
    with path.open("rb") as stream:
        return path.suffix == ".safetensors" or stream.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {_first_line(error)}") from None
    return Contents(kind="safetensors", tensors=_named(tensors, path), values=metadata)


def read_tree(path: str | Path) -> Mapping[Any, Any]:
    """What torch.save was given, tensors and plain data alone; tensors may be memory-mapped.

    Raises UserError as `read_contents` does, and for a container of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch's own legacy reader
            tree = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except _UNREADABLE as error:
        raise UserError(f"{path}: {_why_unreadable(error)}") from None
    if isinstance(tree, Tensor) or not isinstance(tree, Mapping):
        raise UserError(f"{path}: expected a dictionary of tensors, found {type(tree).__name__}")
    return tree


def _read_torch(path: Path) -> Contents:
    tree = read_tree(path)
    tensors: Tensors = {}
    for name, tensor in _leaves(tree, "", 0):
        if name in tensors:
            raise UserError(f"{path}: two tensors are called '{name}'")
        tensors[name] = tensor
    plain = (str, int, float, bool)
    values = {str(key): value for key, value in tree.items() if isinstance(value, plain)}
    return Contents(kind="torch", tensors=_named(tensors, path), values=values)


def _why_unreadable(error: BaseException) -> str:
    culprit = re.search(r"\bunsupported .*", str(error), re.IGNORECASE)
    if culprit and isinstance(error, pickle.UnpicklingError):
        return (
            f"holds Python objects, which are never loaded ({culprit[0].strip()[:120]}); "
            "save the state dict alone"
        )
    return f"not a checkpoint, or a damaged one: {_first_line(error).partition('. ')[0]}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _leaves(node: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if depth > _MAX_DEPTH:
        raise UserError(f"dictionaries nested more than {_MAX_DEPTH} deep at '{prefix[:80]}'")
    if isinstance(node, Tensor):
        yield prefix, node.detach()
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{prefix}.{index}", depth + 1)


def _named(tensors: Tensors, path: Path) -> Tensors:
    """Removes every `module.` path element, as the official readers do."""
    plain: Tensors = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part != "module")
        if short in plain:
            raise UserError(f"{path}: '{name}' appears with and without 'module.'")
        plain[short] = tensor
    return plain


def write_safetensors(path: str | Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Writes contiguous copies; the file appears whole or not at all.

    Raises UserError where it cannot be written.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with write_whole(path) as part:
        try:
            save_file(_unshared(contiguous), part, metadata=dict(metadata))
        except SafetensorError as error:  # the system's reason is in its text alone
            raise UserError(f"{path}: cannot be written: {_first_line(error)}") from None


def write_torch(path: str | Path, tree: Mapping[str, Any]) -> None:
    """torch.save of plain dictionaries of tensors; the file appears whole or not at all.

    Raises UserError where it cannot be written.
    """
    with write_whole(path) as part:
        try:
            torch.save(tree, part)
        except RuntimeError as error:  # what torch makes of a full disk
            raise UserError(f"{path}: cannot be written: {_first_line(error)}") from None


def _unshared(tensors: Tensors) -> Tensors:
    """safetensors refuses tensors that share memory, such as the thirds of a split projection."""
    seen: set[int] = set()
    alone: Tensors = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
        seen.add(storage.data_ptr())
        alone[name] = tensor.clone() if shared else tensor
    return alone
