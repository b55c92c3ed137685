"""Every exception a user can cause.

    OptmemError
    ├── InputError (ValueError)        an argument, text or message that cannot be used
    │   ├── ImageError                 a picture or PDF that cannot be read, or is too large to be read safely
    │   └── CheckpointError            a model's files that are damaged, incomplete, unsafe or not of a known model
    ├── SourceNotFoundError            a file or folder that is not there, or may not be read
    ├── OutputError                    a file or folder that cannot be written
    ├── MissingDependencyError         an optional package that this call needs
    ├── BackendError                   the device or the native module that this call needs is not here
    ├── ModelError                     a pass of the model that failed, or said what is no number
    └── StoreError                     a memory on disk that cannot be used as asked
        ├── StoreBusyError             another process writes to it, or reads while something is to be forgotten
        ├── StoreVersionError          a newer optmem made it, or it must be opened once to write before it can be read
        ├── StoreDamagedError          its database is damaged, or is none
        ├── DiskFailedError            the disk failed under it, and nothing more is acknowledged until it is opened again
        └── PageCorrupted              one page's pixels or tokens are damaged or gone; the other pages are not concerned

Messages say what was given, what is allowed and what to do; they hold no addresses and no private paths.
The command line prints the message as one sentence and leaves with ``exit_code`` (the numbers of sysexits.h).
"""


class OptmemError(Exception):
    """The root of every exception a user can cause."""

    exit_code = 70


class InputError(OptmemError, ValueError):
    """An argument, text or message that cannot be used."""

    exit_code = 65


class ImageError(InputError):
    """A picture or PDF that cannot be read, or is too large to be read safely."""


class CheckpointError(InputError):
    """A model's files that are damaged, incomplete, unsafe or not of a known model."""


class SourceNotFoundError(OptmemError):
    """A file or folder that is not there, or may not be read."""

    exit_code = 66


class OutputError(OptmemError):
    """A file or folder that cannot be written."""

    exit_code = 73


class MissingDependencyError(OptmemError, ImportError):
    """An optional package that this call needs is not installed."""

    exit_code = 69


class BackendError(OptmemError, RuntimeError):
    """The device or the native module that this call needs is not here."""

    exit_code = 69


class ModelError(OptmemError, RuntimeError):
    """A pass of the model failed, or said what is no number."""


class StoreError(OptmemError, RuntimeError):
    """A memory on disk cannot be used as asked."""

    exit_code = 74


class StoreBusyError(StoreError):
    """Another process writes to the memory, or reads while something is to be forgotten."""

    exit_code = 75


class StoreVersionError(StoreError):
    """A newer optmem made the memory, or an older one did and it must be opened once to write before it can be read."""

    exit_code = 65


class StoreDamagedError(StoreError):
    """The memory's database is damaged, or is none."""

    exit_code = 65


class DiskFailedError(StoreError):
    """The disk failed under the memory, and nothing more is acknowledged until it is opened again."""


class PageCorrupted(StoreError):  # noqa: N818 - what has happened to the page, in two words that users search for
    """One page's pixels or tokens are damaged or gone; the other pages are not concerned."""

    exit_code = 65

    def __init__(self, message: str, page: int) -> None:
        super().__init__(message)
        self.page = page  # its number in the memory


def shown(error: BaseException) -> OptmemError:
    """An error as users see it: ours as they are, those of others by their kind alone, for their words name addresses.

    The frames it came through are let go, for they hold pictures and caches.
    """
    ours = error if isinstance(error, OptmemError) else ModelError(f"a part of the engine failed: {type(error).__name__}")
    ours.__traceback__ = ours.__cause__ = ours.__context__ = None
    return ours
