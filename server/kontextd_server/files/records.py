"""The records of stored files, one small JSON file each. Knows where things lie in the folder; knows no contents.

objects/ab/<token>.json      what is known of a file; it exists from the moment the file is whole
objects/ab/<token>.<sha256>  its content
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from kontextd_server.files.atomic import as_json, create_whole, make_folder, read_json
from kontextd_server.files.errors import StoreUnavailable
from kontextd_server.files.names import token_of
from kontextd_server.files.store import StoredFile

log = logging.getLogger(__name__)


class Records:
    """Records by key, below the folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def content(self, key: str, sha256: str) -> Path:
        """Where the content of a file lies: named by the content too, so that no two writers share a target."""
        return self._place(key, f".{sha256}")

    def read(self, key: str) -> StoredFile | None:
        """None where there is none. Raises `FileNotHere` for what is no key, `StoreUnavailable` for a damaged one."""
        found = _parsed(self._place(key, ".json"))
        return found if found is not None and found.key == key else None

    def create(self, file: StoredFile) -> None:
        """Raises `FileExistsError` where the key has a record."""
        path = self._place(file.key, ".json")
        make_folder(path.parent)
        create_whole(path, as_json(asdict(file)))

    def remove(self, key: str) -> bool:
        """False where there was none: another process may have been quicker."""
        try:
            self._place(key, ".json").unlink()
        except FileNotFoundError:
            return False
        return True

    def all(self) -> Iterator[StoredFile]:
        """Every readable record; a damaged one is logged and left for a person to look at."""
        for path in self.root.glob("??/*.json"):
            try:
                found = _parsed(path)
            except StoreUnavailable as error:
                log.warning("%s", error)
                continue
            if found is not None:
                yield found

    def leftovers(self) -> Iterator[Path]:
        """Contents and part-written records whose writers crashed, or have not come to their record yet."""
        for folder in self.root.glob("??"):
            names = {path.name for path in folder.iterdir()}
            yield from (folder / name for name in names if f"{name.partition('.')[0]}.json" not in names)

    def _place(self, key: str, ending: str) -> Path:
        token = token_of(key)
        return self.root / token[:2] / f"{token}{ending}"


def _parsed(path: Path) -> StoredFile | None:
    try:
        values = read_json(path)
        # Any: the file was written from this class; whatever else it may hold by now is refused just here.
        return None if values is None else StoredFile(**values)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise StoreUnavailable(f"the record {path} is damaged: {error}. Remove it or restore a backup.") from error
