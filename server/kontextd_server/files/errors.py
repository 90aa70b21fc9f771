"""The exception tree of the file store. Knows no HTTP: the server maps each class to a status in one table.

    FileStoreError
    ├── FileNotHere         no file under this key: never stored, deleted or expired
    ├── KeyTaken            the key holds other content already; a key never changes its content
    ├── FileTooLarge        over the size limit of one file or part
    ├── InvalidRange        the asked bytes lie outside the file
    ├── UploadNotFound      no multipart upload of this id: never begun, aborted or expired
    ├── InvalidPart         a part number, an etag or the list of parts is wrong
    ├── InvalidGrant        not a grant of ours
    ├── GrantExpired        a grant of ours whose time is over
    ├── QuotaExceeded       the store holds as much as the operator allows
    ├── StoreFull           the disk holds no more
    └── StoreUnavailable    the folder cannot be read or written

Every message names the value and the remedy.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kontextd_models.errors import KontextdError

# What write(2), fsync(2) and link(2) say where there is no room: the disk, a user's quota, the process's file size.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class FileStoreError(KontextdError):
    """Base of all errors raised on purpose by the file store."""


class FileNotHere(FileStoreError):
    """No file under this key; which of the reasons it is, is not told, so that keys cannot be probed."""


class KeyTaken(FileStoreError):
    """The key holds other content already."""


class FileTooLarge(FileStoreError):
    """A file or a part is over its size limit."""


class InvalidRange(FileStoreError):
    """No byte of the asked range lies in the file."""


class UploadNotFound(FileStoreError):
    """No multipart upload of this id."""


class InvalidPart(FileStoreError):
    """A part or a list of parts that cannot be taken."""


class InvalidGrant(FileStoreError):
    """The token is no grant of ours."""


class GrantExpired(FileStoreError):
    """The grant was ours, and its time is over."""


class QuotaExceeded(FileStoreError):
    """The store holds as many bytes as it may."""


class StoreFull(FileStoreError):
    """The disk is full; nothing was left half written."""


class StoreUnavailable(FileStoreError):
    """The folder of the store cannot be read or written."""


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn what the operating system says of `folder` into `StoreFull` or `StoreUnavailable`."""
    try:
        yield
    except OSError as error:
        told = error.strerror or str(error)
        if error.errno in _NO_ROOM:
            raise StoreFull(f"there is no room left in {folder}: {told}. Free some space.") from error
        raise StoreUnavailable(f"{folder} cannot be used: {told}. Check that it is mounted and writable.") from error
