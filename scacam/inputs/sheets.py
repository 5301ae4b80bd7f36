"""Tables as people keep them, Parquet or CSV in the dialect of their spreadsheet."""

import csv
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from scacam.storage import locate

__all__ = ["SHEETS", "Sheet", "read_sheet"]

SHEETS = (".csv", ".tsv", ".parquet")

_TEXT = ("uri", "file")
_DELIMITERS = ",;\t"
_MOST_HEADER = 1 << 16


class Sheet(NamedTuple):
    """Some columns of a table, and the names of all that it has."""

    table: pa.Table
    names: list[str]


def read_sheet(source: str, columns: Sequence[str]) -> Sheet:
    """Read the columns of these names, as far as they are there.

    Of a CSV, blanks around the names are no part of them; its delimiter is a comma, semicolon or
    tab; with the latter two a number may have a decimal comma. `uri` and `file` are text, whatever
    they look like.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such table, or has one of the columns twice.
    """
    filesystem, path = locate(source)
    with filesystem.open_input_file(path) as file:
        if not path.lower().endswith(".parquet"):
            return _read_csv(file, columns)
        names = pyarrow.parquet.read_schema(file).names
        found = _found(names, columns)
        return Sheet(pyarrow.parquet.read_table(file, columns=found), names)


def _read_csv(file: pa.NativeFile, columns: Sequence[str]) -> Sheet:
    begin = file.read(_MOST_HEADER)
    file.seek(0)
    if begin.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in begin:
        raise ValueError("it is UTF-16 or no text; save it as CSV in UTF-8")
    lines = begin.decode("utf-8-sig", errors="replace").splitlines()
    before = 0
    while before < len(lines) and (not lines[before] or lines[before].startswith("sep=")):
        before += 1  # Excel writes such a line for itself
    if before == len(lines):
        raise ValueError("it is empty")
    header = lines[before]
    split = {one: next(csv.reader([header], delimiter=one), []) for one in _DELIMITERS}
    delimiter = max(split, key=lambda one: len(split[one]))
    names = [name.strip().strip('"') for name in split[delimiter]]
    found = _found(names, columns)
    if not found:
        return Sheet(pa.table({}), names)
    by_place = [str(place) for place in range(len(names))]  # as other columns may be twins
    wanted = [by_place[names.index(name)] for name in found]
    read_options = pyarrow.csv.ReadOptions(column_names=by_place, skip_rows=before + 1)
    parse_options = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    text = {by_place[names.index(name)]: pa.string() for name in found if name in _TEXT}
    convert_options = pyarrow.csv.ConvertOptions(
        include_columns=wanted,
        column_types=text,
        decimal_point="." if delimiter == "," else ",",
    )
    try:
        table = pyarrow.csv.read_csv(file, read_options, parse_options, convert_options)
    except pa.ArrowInvalid as error:
        if "UTF8" in str(error):
            raise ValueError("it is no UTF-8; save it as CSV in UTF-8") from error
        raise
    table = table.rename_columns(found)
    if names != split[delimiter]:  # who writes a blank after each comma does so in every row
        for index, field in enumerate(table.schema):
            if pa.types.is_string(field.type):
                trimmed = pc.utf8_trim_whitespace(table[field.name])
                table = table.set_column(index, field.name, trimmed)
    return Sheet(table, names)


def _found(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Those of the columns that are there, once."""
    for name in columns:
        if names.count(name) > 1:
            raise ValueError(f"it has several columns {name!r}; leave one")
    return [name for name in columns if name in names]
