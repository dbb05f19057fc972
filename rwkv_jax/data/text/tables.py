"""Reads texts from one column of Parquet and Arrow files, batch by batch; needs the `parquet` extra."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rwkv_jax.config import ConfigError

SUFFIXES = (".parquet", ".arrow", ".feather")
"""Suffixes of tables. Arrow files may have the file format (Feather 2) or the stream format."""

_BATCH_ROWS = 1024
_ARROW_FILE = b"ARROW1"


def is_table(name: str) -> bool:
    """Whether a file is a table, by its suffix."""
    return name.lower().endswith(SUFFIXES)


def read_table(path: Path, column: str) -> Iterator[str]:
    """The texts of a column, row by row; one batch of the file is in memory at a time.

    Raises ConfigError without pyarrow, for a file that is damaged or lacks the text column, and, with its number, for a
    row without text.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(f'{path}: needs the package pyarrow: pip install "rwkv-jax[parquet]"') from error
    row = 0
    try:
        for texts in _column_batches(path, column):
            if texts.null_count:
                row += next(index for index, text in enumerate(texts) if not text.is_valid)
                raise ConfigError(f"{path}: row {row} has no text in its column {column!r} (null); remove it")
            for text in texts:
                yield text.as_py()
                row += 1
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: row {row}, column {column!r} is not UTF-8 at byte {error.start}") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read as a table ({error}); make it again") from error


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of each row of a table, `FILE: row 3`, as Python's values; a batch is in memory at a time.

    Raises ConfigError without pyarrow, and for a file that is damaged.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(f'{path}: needs the package pyarrow: pip install "rwkv-jax[parquet]"') from error
    row = 0
    try:
        for batch in _batches(path, lambda schema: None):
            for record in batch.to_pylist():
                yield f"{path}: row {row}", record
                row += 1
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a table ({error}); make it again") from error


def _column_batches(path: Path, column: str) -> Iterator[Any]:
    """Arrow arrays of the column."""
    for batch in _batches(path, lambda schema: _check_column(schema, column, path), [column]):
        yield batch.column(column)


def _batches(path: Path, check: Callable[[Any], None], columns: list[str] | None = None) -> Iterator[Any]:
    """Arrow batches of rows, of a table whose schema passes a check; of a Parquet file some columns only."""
    import pyarrow
    from pyarrow import parquet

    if path.suffix.lower() == ".parquet":
        with parquet.ParquetFile(path) as file:
            check(file.schema_arrow)
            yield from file.iter_batches(_BATCH_ROWS, columns=columns)
        return
    with pyarrow.memory_map(str(path)) as source:
        if source.read(len(_ARROW_FILE)) == _ARROW_FILE:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            source.seek(0)
            reader = batches = pyarrow.ipc.open_stream(source)
        check(reader.schema)
        yield from batches


def _check_column(schema: Any, column: str, path: Path) -> None:
    from pyarrow import types

    if column not in schema.names:
        raise ConfigError(f"{path}: has no column {column!r}; set data.text_field to one of {sorted(schema.names)}")
    if schema.names.count(column) > 1:
        raise ConfigError(f"{path}: has several columns {column!r}; rename all but one")
    kind = schema.field(column).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(values) or types.is_large_string(values) or types.is_string_view(values)):
        of_text = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
        raise ConfigError(
            f"{path}: column {column!r} is not text but {kind}; set data.text_field to a column of text"
            + (f", such as {of_text}" if of_text else "")
        )
