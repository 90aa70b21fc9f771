"""What `kontextd serve` says: where everything lies at its start, how to call it when it is ready. Knows no routes."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import sqlalchemy as sa
from cryptography import x509
from kontextd_models.embedded import sample_photo

from kontextd_server.files import FileStore, Label
from kontextd_server.files.errors import FileStoreError
from kontextd_server.settings import SettingError, Settings
from kontextd_server.store import Store
from kontextd_server.wire.endpoints import ENDPOINTS
from kontextd_server.wire.hosts import HostNames
from kontextd_server.wire.key_files import write_private
from kontextd_server.wire.proxy import PROXY_PATH

log = logging.getLogger(__name__)

_EVERYWHERE = {"0.0.0.0", "::"}
_MADE_HERE = re.compile(r"[0-9a-f-]{36}:[0-9a-f]{64}")  # as `ApiKeys.create` makes keys
_FIRST = "first"  # the name of the key, and so the owner of what is submitted with it
_WEEK_S = 7 * 86400.0
_DAY_S = 86400.0
_PROMPT = "make it black and white"


def address(settings: Settings, listener: socket.socket) -> str:
    """Where this box is reached."""
    if settings.public_url is not None:
        return settings.public_url
    host = "localhost" if settings.host in _EVERYWHERE else settings.host
    if settings.tls_cert is not None:
        host = _own_name(settings.tls_cert) or host
    name = f"[{host}]" if ":" in host else host
    return f"{'http' if settings.tls_cert is None else 'https'}://{name}:{listener.getsockname()[1]}"


def _own_name(certificate: Path) -> str | None:
    """The first name, else address, of a certificate that is none of fal's."""
    leaf = x509.load_pem_x509_certificate(certificate.read_bytes())
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    own = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    return next((name for name in own if name not in HostNames().all and "*" not in name), None)


def first_key(store: Store, path: Path) -> str:
    """The key in a file; one that the store does not know, or knows as revoked, is replaced by a new one.

    Raises `SettingError` where the file holds anything else.
    """
    if path.exists():
        plain = path.read_text(encoding="ascii", errors="replace").strip()
        if store.keys.find(plain) is not None:
            return plain
        if plain and not _MADE_HERE.fullmatch(plain):
            raise SettingError(
                f"--first-key {path} holds no key of kontextd, so it is not replaced. Name another file."
            )
    plain = store.keys.create(_FIRST).plain
    write_private(path.absolute(), f"{plain}\n".encode())
    return plain


def at_start(settings: Settings, database: str, at: str, devices: Sequence[str], store: Store) -> Iterator[str]:
    """Lines for the log."""
    yield f"listening at {at}; workers: {', '.join(devices) or 'none, they join with kontextd worker'}"
    yield f"model {settings.model or 'embedded demonstration model'}"
    yield f"jobs in {sa.make_url(database)!r}, files in {settings.files_folder}"  # repr hides the password
    yield f"finished jobs are kept {_lasting(settings.jobs_kept_s)}, files {_files_kept(settings)}"
    if settings.offline:
        yield "off-line: inputs come from uploads and the mirror alone"
    if not any(key.revoked_at is None for key in store.keys.all()):
        yield "nobody has a key yet, so nobody can call: kontextd keys create --name NAME"


def when_ready(at: str, key: str | None, files: FileStore, settings: Settings) -> None:
    """To stdout: lines to be pasted, each of which works as it stands."""
    print(f"\nkontextd is ready at {at}", flush=True)
    if key is None:
        return
    try:
        with sample_photo().open("rb") as photo:
            kept = files.put([photo.read()], Label("photo.jpg", "image/jpeg", _WEEK_S))
    except FileStoreError as error:  # a server whose disk is full still has results to hand out
        log.warning("there is nothing to show a call with: %s", error)
        return
    ca = None if settings.tls_cert is None else settings.tls_cert.absolute().with_name("ca.pem")
    trust = ca if ca is not None and ca.exists() else None  # of `kontextd certs`; others are trusted already
    call = _Call(at, key, f"{at}/files/{kept.key}", trust)
    for name, lines in (("curl", _curl(call)), ("JavaScript", _javascript(call)), ("Python", _python(call))):
        print(f"\n# {name}\n{lines}", flush=True)


def _files_kept(settings: Settings) -> str:
    """Also where nothing limits them: a disk that fills up is to surprise nobody."""
    quota = "" if settings.files_quota_mib is None else f", at most {settings.files_quota_mib} MiB of them"
    if settings.files_kept_s is not None:
        return _lasting(settings.files_kept_s) + quota
    return f"until they are removed{quota}; KONTEXTD_FILES_KEPT_S sets a time, kontextd files prune removes old ones"


def _lasting(seconds: float) -> str:
    return f"{seconds / _DAY_S:g} days" if seconds >= _DAY_S else f"{seconds:g} s"


@dataclass(frozen=True)
class _Call:
    """What the lines have in common. `trust`: the CA that clients do not know yet."""

    at: str
    key: str
    picture: str
    trust: Path | None


def _curl(call: _Call) -> str:
    trust = f" --cacert {quote(str(call.trust))}" if call.trust else ""
    body = json.dumps({"image_url": call.picture, "prompt": _PROMPT})
    return (
        f"curl -s{trust} {call.at}/{ENDPOINTS[0].id} -H 'Authorization: Key {call.key}' \\\n"
        f"  -H 'Content-Type: application/json' -d '{body}'"
    )


def _javascript(call: _Call) -> str:
    trust = f"NODE_EXTRA_CA_CERTS={quote(str(call.trust))} " if call.trust else ""
    return f"""npm install --no-save @fal-ai/client && {trust}node --input-type=module -e '
import {{ fal }} from "@fal-ai/client";
fal.config({{ credentials: "{call.key}", proxyUrl: {{ url: "{call.at}{PROXY_PATH}", when: "always" }} }});
const {{ data }} = await fal.subscribe("{ENDPOINTS[0].id}", {{
  input: {{ image_url: "{call.picture}", prompt: "{_PROMPT}" }} }});
console.log(data.images[0].url);'"""


def _python(call: _Call) -> str:
    """By its host variables, which know https only; without TLS by the constant that they set."""
    scheme, _, host = call.at.partition("://")
    hosts = f"FAL_RUN_HOST={host} FAL_QUEUE_RUN_HOST={host}/queue " if scheme == "https" else ""
    trust = f"SSL_CERT_FILE={quote(str(call.trust))} " if call.trust else ""
    setup = "" if hosts else f'\nfal_client.client.QUEUE_URL_FORMAT = "{call.at}/queue/"'
    return f"""pip install fal-client && {trust}{hosts}FAL_KEY='{call.key}' python3 -c '
import fal_client{setup}
result = fal_client.subscribe("{ENDPOINTS[0].id}", arguments={{
    "image_url": "{call.picture}", "prompt": "{_PROMPT}"}})
print(result["images"][0]["url"])'"""
