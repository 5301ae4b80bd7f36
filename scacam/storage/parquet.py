"""Parquet files: some columns of one, or a whole table into one."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet
from pyarrow import fs

from scacam.storage.files import locate

__all__ = ["read_columns", "write_table"]


def read_columns(filesystem: fs.FileSystem, path: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of a Parquet file."""
    with filesystem.open_input_file(path) as file:
        return pyarrow.parquet.ParquetFile(file).read(columns)


def write_table(path: str, table: pa.Table) -> None:
    """Write a table into a file whose folder is there. Raises OSError if that cannot be done."""
    filesystem, inner_path = locate(path)
    with filesystem.open_output_stream(inner_path) as file:
        pyarrow.parquet.write_table(table, file)
