"""The file store: what uploads bring and jobs make, under unguessable keys, until it expires. Knows no HTTP."""

from kontextd_server.files.folder import FolderLimits, FolderStore
from kontextd_server.files.grants import Grant, GrantSigner
from kontextd_server.files.multipart import PartLimits
from kontextd_server.files.ranges import Span, parse_range
from kontextd_server.files.store import (
    FOR_EVER,
    FileStore,
    FileWriter,
    Label,
    OpenFile,
    Part,
    PartWriter,
    StoredFile,
    Swept,
    Usage,
)

__all__ = [
    "FOR_EVER",
    "FileStore",
    "FileWriter",
    "FolderLimits",
    "FolderStore",
    "Grant",
    "GrantSigner",
    "Label",
    "OpenFile",
    "Part",
    "PartLimits",
    "PartWriter",
    "Span",
    "StoredFile",
    "Swept",
    "Usage",
    "parse_range",
]
