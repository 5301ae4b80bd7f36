"""Where files are, local or on object storage, and how they are read and written."""

from scacam.storage.files import (
    PATIENCE_S,
    is_transient,
    join,
    locate,
    patiently,
    read_ahead,
    read_bytes,
)

__all__ = ["PATIENCE_S", "is_transient", "join", "locate", "patiently", "read_ahead", "read_bytes"]
