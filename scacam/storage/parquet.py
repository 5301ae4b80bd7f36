"""Parquet files: some columns of one, or a whole table into one."""

from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet
from pyarrow import fs

from scacam.storage.files import writing

__all__ = ["read_columns", "write_table", "write_tables"]


def read_columns(filesystem: fs.FileSystem, path: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of a Parquet file."""
    with filesystem.open_input_file(path) as file:
        return pyarrow.parquet.ParquetFile(file).read(columns)


def write_table(path: str, table: pa.Table, plain: Sequence[str] = ()) -> None:
    """Write a table into a file, in a folder that is made if need be.

    Args:
        path: where, locally or on a store.
        table: what.
        plain: columns whose values hardly repeat: a dictionary would only keep zstd from its work.

    Raises:
        OSError: that cannot be done.
    """
    write_tables(path, [table], table.schema, plain)


def write_tables(
    path: str, tables: Iterable[pa.Table], schema: pa.Schema, plain: Sequence[str] = ()
) -> None:
    """Write tables of one schema into a file, one after the other, as `write_table` does."""
    repeating = [name for name in schema.names if name not in plain]
    with (
        writing(path) as file,
        pyarrow.parquet.ParquetWriter(
            file, schema, compression="zstd", use_dictionary=repeating if plain else True
        ) as writer,
    ):
        for table in tables:
            writer.write_table(table)
