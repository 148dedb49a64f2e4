"""results.parquet: one row a video, in list order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from kineticlip.evaluation.rows import VideoRow
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.journal import Json


def table_bytes(rows: Sequence[VideoRow], made: Json) -> bytes:
    """The rows as a Parquet file; `made`, how they came about, goes into its metadata."""
    import pyarrow
    from pyarrow import parquet

    text, integer = pyarrow.string(), pyarrow.int64()
    kinds = {
        "video": text,
        "label": integer,
        "label_name": text,
        "prediction": integer,
        "top5": pyarrow.list_(integer),
        "top5_names": pyarrow.list_(text),
        "top5_scores": pyarrow.list_(pyarrow.float32()),
        "correct": pyarrow.bool_(),
        "views": integer,
        "frames": integer,
        "decoder": text,
        "status": text,
        "reason": text,
    }
    schema = pyarrow.schema(list(kinds.items()), metadata={"kineticlip": json.dumps(made)})
    columns = [[getattr(row, name) for row in rows] for name in kinds]
    table = pyarrow.table(
        [pyarrow.array(column, kinds[name]) for name, column in zip(kinds, columns, strict=True)],
        schema=schema,
    )
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_table(path: Path) -> list[VideoRow]:
    """The rows of a Parquet file. Raises UserError for one that is damaged or lacks a column."""
    import pyarrow
    from pyarrow import parquet

    columns = [field.name for field in fields(VideoRow)]
    try:
        table = parquet.read_table(path, columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as Parquet: {problem}") from None
    if missing := set(columns) - set(table.column_names):
        raise UserError(f"{path}: no column '{min(missing)}'")
    return [VideoRow(**row) for row in table.to_pylist()]
