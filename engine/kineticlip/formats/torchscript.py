"""Tensors of a TorchScript archive, read without running anything in it.

OpenAI publishes CLIP as TorchScript. `torch.load(weights_only=True)` refuses such a file and
`torch.jit.load` compiles the program inside it, so the archive is read here as what it is: a zip
whose `data.pkl` lists module attributes and whose `data/<n>` records hold raw storages. The
unpickler knows plain containers, storages and tensors, and refuses every other name; the code
records are never opened.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kineticlip.runtime.errors import UserError

_STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# TorchScript writes typed lists through these; the payload is an ordinary list.
_LISTS = {"build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"}
# What malformed bytes can make the unpickler, the zip reader or a tensor view raise.
_MALFORMED = (
    pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, LookupError,
    RuntimeError, OverflowError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
_MAX_ATTRIBUTES = 200_000  # the largest CLIP archive has about 6,000


class _Module:
    """A TorchScript object: nothing but its attributes."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a module state that is not a dictionary")
        self.attributes = state


class _Reader(pickle.Unpickler):
    """Builds modules, containers and tensors; any other global is an error."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(_record(archive, f"{root}/data.pkl")))
        self._archive = archive
        self._root = root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "collections" and name == "OrderedDict":
            return collections.OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return self._tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.jit._pickle":
            if name in _LISTS:
                return self._list
            if name == "restore_type_tag":
                return self._untagged
        raise pickle.UnpicklingError(f"refused to load '{module}.{name}'")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"refused a persistent object of kind {kind!r}")
        if key not in self._storages:
            payload = _record(self._archive, f"{self._root}/data/{key}")
            if count * dtype.itemsize > len(payload):
                raise pickle.UnpicklingError(f"storage {key} is shorter than declared")
            self._storages[key] = (
                torch.frombuffer(bytearray(payload), dtype=dtype, count=count)
                if count
                else torch.empty(0, dtype=dtype)
            )
        return self._storages[key]

    def _tensor(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        if not isinstance(storage, Tensor):
            raise pickle.UnpicklingError("a tensor without a storage")
        return storage.as_strided(tuple(size), tuple(stride), offset)

    def _list(self, items: Any) -> Any:
        return items

    def _untagged(self, value: Any, _type: Any) -> Any:
        return value


def _record(archive: zipfile.ZipFile, name: str) -> bytes:
    """One record. torch never compresses them; a few compressed bytes could become gigabytes."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"record {name} is compressed")
    return archive.read(name)


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether a zip is TorchScript; the mark is torch's own: only it has `constants.pkl`."""
    return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Every tensor attribute by its dotted module path, in the dtype of the file.

    Raises UserError for a damaged archive and for one that asks for anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(
                name.removesuffix("/data.pkl")
                for name in archive.namelist()
                if name.count("/") == 1 and name.endswith("/data.pkl")
            )
            top = _Reader(archive, root).load()
            return dict(_tensors(top))
    except StopIteration:
        raise UserError(f"{path}: a TorchScript archive without data.pkl") from None
    except _MALFORMED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as a TorchScript archive: {reason}") from None


def _tensors(top: Any) -> Iterator[tuple[str, Tensor]]:
    """Walks modules depth first; bounded, because a pickle may share nodes 2^n ways."""
    pending: list[tuple[str, Any]] = [("", top)]
    for _ in range(_MAX_ATTRIBUTES):
        if not pending:
            return
        name, value = pending.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, _Module):
            dot = f"{name}." if name else ""
            pending.extend(
                (f"{dot}{key}", item) for key, item in reversed(value.attributes.items())
            )
    raise pickle.UnpicklingError(f"more than {_MAX_ATTRIBUTES} attributes")
