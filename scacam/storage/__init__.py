"""Where files are, local or on object storage, and how they are read and written."""

from scacam.storage.files import (
    OUT_OF_REACH,
    PATIENCE_S,
    absolute,
    delete,
    is_transient,
    join,
    locate,
    patiently,
    read_ahead,
    read_bytes,
    uri_of,
    write_bytes,
    writing,
)

__all__ = [
    "OUT_OF_REACH", "PATIENCE_S", "absolute", "delete", "is_transient", "join", "locate",
    "patiently", "read_ahead", "read_bytes", "uri_of", "write_bytes", "writing",
]  # fmt: skip
