"""`kontextd serve`, `worker` and `api`: the processes of a box. Knows settings and parts; the work is elsewhere.

`serve` holds the listening socket and keeps an API process and the workers running; `api` is what it starts for the
API. A request that comes while the API starts anew waits in the socket.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from kontextd_server.cli_options import add_settings, as_environment, given
from kontextd_server.settings import SettingError, Settings

if TYPE_CHECKING:
    from kontextd_server.files import FileStore
    from kontextd_server.store import Store
    from kontextd_server.worker import ChildSpec

log = logging.getLogger(__name__)

_BEYOND_DRAIN_S = 10.0  # what is open after the drain is cut off within this time
_MISTAKE = 2  # the exit code of a process that cannot start as it is configured
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
_GPU_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # the second in Windows' Linux
_SHARED = ("data", "database", "files", "model", "device")


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "host", "port", *_SHARED, "workers", "tls_cert", "tls_key", "public_url")
    parser.add_argument(
        "--first-key",
        type=Path,
        metavar="FILE",
        help="make a key, keep it in FILE, and print how to use it; a key that is there already is used",
    )


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, *_SHARED)
    parser.add_argument("--worker-id", metavar="ID", help="default: the host's name and a random number")


def add_api_options(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, *_SHARED, "host", "port", "tls_cert", "tls_key", "public_url")
    parser.add_argument("--descriptor", type=int, metavar="N", help="an open socket to listen at")


def run_serve(arguments: argparse.Namespace, settings: Settings) -> int:
    """Until SIGTERM, SIGINT or SIGHUP."""
    from kontextd_models.folder import check_folder

    from kontextd_server import parts, welcome
    from kontextd_server.fetch.webhooks import post
    from kontextd_server.listening import check_certificate, check_lending, listening_socket
    from kontextd_server.worker import Deliverer, Housekeeping, OldFiles, OldJobs, supervise

    _check_temporary_folder()
    check_certificate(settings.tls_cert, settings.tls_key)
    check_lending(settings)
    if settings.model is not None and settings.workers != 0:
        check_folder(settings.model)  # in a second, before a worker has imported torch to say the same
    signing = parts.Secrets.of(parts.Places.of(settings))
    web, files = parts.web(settings), parts.file_store(settings)
    with ExitStack() as stack:
        store = stack.enter_context(parts.job_store(settings, upgrade=True))
        _take_keys(store, settings.api_keys)
        listener = listening_socket(settings.host, settings.port)
        stack.callback(listener.close)
        address = welcome.address(settings, listener)
        devices = _devices(settings)
        key = welcome.first_key(store, arguments.first_key) if arguments.first_key else None
        housekeeping = Housekeeping(store)
        deliverer = Deliverer(
            store,
            partial(post, web),
            signing.webhooks,
            settings.address_settings(),
            settings.delivery_policy(settings.result_report),
        )
        for line in welcome.at_start(settings, parts.database_url(settings), address, devices, store):
            log.info("%s", line)
        return supervise(
            [_api_child(listener, settings), *_worker_children(devices, settings.worker_silence_s)],
            [housekeeping, OldJobs(store), OldFiles(files), deliverer],
            lambda run_id: housekeeping.report_lost(_worker_id(run_id)),
            {**os.environ, **as_environment(given(arguments))},
            settings.supervisor_policy(settings.drain_s),
            on_ready=lambda: _say_ready(address, key, files, settings),
            on_stopping=listener.close,  # the API has its own: whoever comes now is refused, and does not wait for ever
        )


def run_worker(arguments: argparse.Namespace, settings: Settings) -> int:
    """Until SIGTERM, SIGINT or SIGHUP."""
    from kontextd_server import parts
    from kontextd_server.worker import Notifier, WorkerParts, load_kontext
    from kontextd_server.worker import run_worker as run

    places, files = parts.Places.of(settings), parts.file_store(settings)
    with parts.job_store(settings) as store:
        worker = WorkerParts(
            worker_id=arguments.worker_id or f"{socket.gethostname()}-{token_hex(4)}",
            store=store,
            files=files,
            inputs=parts.fetcher(settings, files),
            scratch=places.scratch,
            load=partial(load_kontext, settings.engine_config(places.compiled), places.model_sums),
            policy=settings.worker_policy(settings.drain_s),
        )
        return run(worker, Notifier.from_environment(os.environ))


def run_api(arguments: argparse.Namespace, settings: Settings) -> int:
    """The API process alone, until SIGTERM, SIGINT or SIGHUP. Never imports torch."""
    from kontextd_server.listening import check_certificate, listening_socket, serve_api
    from kontextd_server.worker.signals import ask_to_end

    if signal.SIGHUP in ask_to_end():  # uvicorn knows the other two alone
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    check_certificate(settings.tls_cert, settings.tls_key)
    if arguments.descriptor is None:
        listener = listening_socket(settings.host, settings.port)
    else:
        listener = socket.socket(fileno=arguments.descriptor)
    return serve_api(settings, listener)


def _check_temporary_folder() -> None:
    """Raises `SettingError` where the sockets of children could not be made, at any time."""
    from kontextd_server.worker.socket_folder import MOST_BYTES_OF_ROOT

    root = tempfile.gettempdir()
    size = len(os.fsencode(root))
    if size > MOST_BYTES_OF_ROOT:
        told = f"the path of the folder for temporary files, {root}, is too long for sockets in it"
        raise SettingError(f"{told}: {size} bytes, at most {MOST_BYTES_OF_ROOT}. Set TMPDIR to a shorter one.")


def _say_ready(address: str, key: str | None, files: FileStore, settings: Settings) -> None:
    """Where stdout cannot be written (a full disk, a reader that went away) the log says it, and the server goes on."""
    from kontextd_server import welcome

    try:
        welcome.when_ready(address, key, files, settings)
    except (OSError, ValueError) as error:  # ValueError: what its encoding cannot tell
        log.warning("kontextd is ready at %s, but stdout cannot be written: %s", address, error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or what waits to be written fails at the end


def _api_child(listener: socket.socket, settings: Settings) -> ChildSpec:
    """It beats as a worker does, but is silent while it drains."""
    from kontextd_server.worker import ChildSpec

    descriptor = listener.fileno()
    return ChildSpec(
        "api",
        lambda _: _command("api", "--descriptor", str(descriptor)),
        silence_s=settings.worker_silence_s + settings.drain_s + _BEYOND_DRAIN_S,
        final_codes=frozenset({_MISTAKE}),
        descriptors=(descriptor,),
    )


def _worker_children(devices: Sequence[str], silence_s: float) -> list[ChildSpec]:
    from kontextd_server.worker import EXIT_MISTAKE, ChildSpec

    def spec(number: int, device: str) -> ChildSpec:
        return ChildSpec(
            f"worker-{number}",
            lambda run_id: _command("worker", "--worker-id", _worker_id(run_id), "--device", device),
            is_worker=True,
            silence_s=silence_s,
            final_codes=frozenset({EXIT_MISTAKE}),
        )

    return [spec(number, device) for number, device in enumerate(devices)]


def _worker_id(run_id: str) -> str:
    """What the worker of a run is called in the job store: other boxes have runs of the same names."""
    return f"{socket.gethostname()}-{run_id}"


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kontextd_server.cli", *arguments]


def _devices(settings: Settings) -> list[str]:
    """One for each worker."""
    if settings.device != "auto":
        return [settings.device] * (1 if settings.workers is None else settings.workers)
    gpus = _gpu_count()
    found = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    count = len(found) if settings.workers is None else settings.workers
    return [found[number % len(found)] for number in range(count)]


def _gpu_count() -> int:
    """What torch sees, asked in a process of its own: this one is to stay small."""
    if not any(path.exists() for path in _GPU_FILES):
        return 0
    try:
        asked = subprocess.run([sys.executable, "-c", _COUNT_GPUS], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as error:
        raise SettingError("torch takes more than 300 s to count the GPUs; see kontextd doctor.") from error
    if asked.returncode != 0:
        raise SettingError(f"torch cannot count the GPUs ({asked.stderr.strip()[-300:]}); see kontextd doctor.")
    return int(asked.stdout)


def _take_keys(store: Store, keys: Sequence[str]) -> None:
    from kontextd_server.store.errors import KeyRefused

    for key in keys:
        name, _, plain = key.partition("=")
        try:
            kept = store.keys.import_key(plain, name)
        except KeyRefused as error:
            raise SettingError(f"KONTEXTD_API_KEYS: {error}") from error
        if kept.revoked_at is not None:
            log.warning("the key of %r in KONTEXTD_API_KEYS is revoked, as %s, and stays so", name, kept.id)
