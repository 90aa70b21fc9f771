"""What our processes are made of, by the settings. Knows where things lie; knows no commands and no HTTP.

DATA/jobs.sqlite     the job store, unless another database is set
DATA/files/          files and the mirror, unless another folder is set
DATA/secrets/        what signs tokens, upload grants and webhooks: the same on every box that serves the API
DATA/loras/          the library of LoRA files of this box
DATA/downloads/      the cache of LoRA files of this box
DATA/scratch/        inputs of running jobs
DATA/compiled/       compiled blocks of the model, for the next start
DATA/model_sums.json hashes of model files that have not changed since
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from kontextd_models.errors import KontextdError

from kontextd_server.fetch import Fetcher, Web
from kontextd_server.fetch.roots import LIBRARY, LoraRoots
from kontextd_server.files import FolderStore, GrantSigner
from kontextd_server.lora_library import LoraLibrary
from kontextd_server.mirror import Mirror
from kontextd_server.settings import SettingError, Settings
from kontextd_server.store import Store, StoreUnavailable, migrate, open_store, sqlite_url
from kontextd_server.store.errors import StoreError
from kontextd_server.wire.addresses import possible_file_key
from kontextd_server.wire.key_files import load_or_create
from kontextd_server.wire.tokens import TokenSigner
from kontextd_server.wire.webhooks import WebhookKey

log = logging.getLogger(__name__)

_PRIVATE = 0o700


@dataclass(frozen=True)
class Places:
    """Folders and files below the data folder, which is made where absent."""

    root: Path

    @classmethod
    def of(cls, settings: Settings) -> Places:
        """Raises `SettingError` where nothing can be kept there."""
        root, why = settings.data_folder, "it is not ours to write in"
        try:
            root.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            is_ours = os.access(root, os.W_OK | os.X_OK)
        except OSError as error:
            is_ours, why = False, error.strerror or str(error)
        if not is_ours:
            raise SettingError(f"the data folder {root} cannot be used: {why}. Choose another with --data.")
        return cls(root)

    @property
    def sqlite(self) -> Path:
        return self.root / "jobs.sqlite"

    @property
    def downloads(self) -> Path:
        return self.root / "downloads"

    @property
    def loras(self) -> Path:
        return self.root / "loras"

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    @property
    def compiled(self) -> Path:
        return self.root / "compiled"

    @property
    def model_sums(self) -> Path:
        return self.root / "model_sums.json"

    def secret(self, name: str) -> Path:
        return self.root / "secrets" / name


@dataclass(frozen=True)
class Secrets:
    """What the API signs with."""

    tokens: TokenSigner
    grants: GrantSigner
    webhooks: WebhookKey

    @classmethod
    def of(cls, places: Places) -> Secrets:
        """Each is made where there is none."""
        grants = load_or_create(places.secret("grants"), lambda: secrets.token_bytes(32))
        try:
            return cls(
                TokenSigner.from_file(places.secret("tokens")),
                GrantSigner([grants]),
                WebhookKey.from_file(places.secret("webhooks.pem")),
            )
        except ValueError as error:
            raise SettingError(f"{places.root / 'secrets'} cannot be used: {error}") from error


def database_url(settings: Settings) -> str:
    return settings.database or sqlite_url(Places(settings.data_folder).sqlite)


@contextmanager
def job_store(settings: Settings, *, upgrade: bool = False) -> Iterator[Store]:
    """The job store, closed at the end. `upgrade` makes its tables, or brings them to this version.

    What the store raises within is told as a command tells its errors: `SettingError`, or `KontextdError` where the
    database does not answer.
    """
    url = database_url(settings)
    with _told_errors():
        if upgrade:
            Places.of(settings)
            migrate(url)
        else:
            _check_sqlite_file(url)
        store = open_store(url, settings.store_policy())
        try:
            yield store
        finally:
            store.close()


@contextmanager
def _told_errors() -> Iterator[None]:
    try:
        yield
    except StoreUnavailable as error:
        raise KontextdError(f"{error}. See the database that --database or KONTEXTD_DATABASE names.") from error
    except StoreError as error:
        raise SettingError(str(error)) from error


def _check_sqlite_file(url: str) -> None:
    """Connecting would make an empty one, for everybody to read."""
    if not url.startswith("sqlite:"):
        return
    path = Path(sa.make_url(url).database or "")
    if not path.exists():
        raise SettingError(
            f"there is no job store at {path}: check --data or --database. kontextd serve makes it, and so does "
            "kontextd keys create."
        )


def file_store(settings: Settings) -> FolderStore:
    return FolderStore(settings.files_folder, settings.folder_limits())


def mirror(settings: Settings) -> Mirror:
    return Mirror(settings.files_folder)


def web(settings: Settings) -> Web:
    """Raises `SettingError` for fetch settings that do not go together."""
    try:
        return Web(settings.fetch_config(Places.of(settings).downloads, settings.max_image_mib, settings.max_lora_mib))
    except ValueError as error:
        raise SettingError(f"the KONTEXTD_FETCH_ settings cannot be used together: {error}.") from error


def fetcher(settings: Settings, files: FolderStore) -> Fetcher:
    return Fetcher(web(settings), files, possible_file_key, mirror(settings), lora_roots(settings))


def lora_library(settings: Settings) -> LoraLibrary:
    return LoraLibrary(Places(settings.data_folder).loras)


def lora_roots(settings: Settings) -> LoraRoots:
    """A folder that is not there is told, and nothing else: a share may be mounted later."""
    roots = settings.roots(Places(settings.data_folder).loras)
    for name, folder in roots.folders.items():
        if name != LIBRARY and not folder.is_dir():
            log.warning("the LoRA root %s is no folder now: %s", name, folder)
    return roots
