"""The exceptions of scacam. Each message names the input it is about and says what to do."""

__all__ = ["ImageError", "NetworkError", "RunError", "ScacamError"]


class ScacamError(Exception):
    """Base of every error that scacam raises on purpose."""


class ImageError(ScacamError):
    """One image cannot be explained; the others can."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # It crosses processes, and an exception is rebuilt from its message alone.
        return type(self), (self.kind, str(self))


class NetworkError(ScacamError):
    """A network, its weights or its target layer cannot be used as asked."""


class RunError(ScacamError):
    """A job cannot run, or a run cannot be read, as asked."""
