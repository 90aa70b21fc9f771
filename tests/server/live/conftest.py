"""One box, one studio and one private network for all tests of this folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fal_clients
import pytest
from kontextd_server.certs import CertificateFiles
from kontextd_server.wire.hosts import HostNames

from .box import KONTEXTD, START_S, Keys, LiveBox, environment_of, running, serving
from .inline import Inline, call_inline
from .private_net import NoNamespaces, PrivateNet, private_net
from .studio import PHOTO_SIDE, Studio, open_studio, picture

FAL_NAMES = HostNames().all
ELSEWHERE = "127.0.0.2"  # of the loopback too, and nobody listens there
TO_THE_STUDIO = {"KONTEXTD_FETCH_ALLOW_IMAGE": "127.0.0.0/8", "KONTEXTD_FETCH_ALLOW_WEBHOOK": "127.0.0.0/8"}
# Until it answers at this name, by the certificate of this CA.
_WAIT = """
import ssl, sys, time, urllib.error, urllib.request
trusted = ssl.create_default_context(cafile=sys.argv[2])
until = time.monotonic() + float(sys.argv[3])
while True:
    try:
        sys.exit(urllib.request.urlopen(sys.argv[1], context=trusted).status != 200)
    except urllib.error.HTTPError:
        raise
    except OSError:
        if time.monotonic() > until:
            raise
        time.sleep(0.1)
"""


@pytest.fixture(scope="session")
def js() -> Path:
    """Installing the clients takes longer than a test may."""
    return fal_clients.js_modules()


@pytest.fixture(scope="session")
def studio() -> Iterator[Studio]:
    with open_studio() as opened:
        yield opened


@pytest.fixture(scope="session")
def photo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    path.write_bytes(picture(PHOTO_SIDE))
    return path


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory, studio: Studio) -> Iterator[LiveBox]:
    """The box, with its one worker and the embedded model; do not leave jobs running."""
    folder, keys = tmp_path_factory.mktemp("box"), Keys()
    settings = {
        **TO_THE_STUDIO,
        "KONTEXTD_SYNC_RESULTS_KEPT_S": "30",
        "KONTEXTD_PROXY_KEY": keys.lent,
        "KONTEXTD_PROXY_ORIGINS": studio.page("localhost").rstrip("/"),
        "KONTEXTD_CORS_ORIGINS": ",".join(studio.page(host).rstrip("/") for host in ("localhost", "guest.localhost")),
    }
    with serving(folder, folder / "data", keys, settings) as served:
        yield served
    shutil.rmtree(folder / "data")  # half a gigabyte of uploads, of which pytest would keep three


@pytest.fixture(scope="session")
def inline(box: LiveBox, studio: Studio, js: Path) -> Inline:
    """Made once and early: what came of it is to be forgotten meanwhile."""
    return call_inline(box, studio)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    """For fal's names and two of the box's own."""
    folder = tmp_path_factory.mktemp("certs")
    command = (*KONTEXTD, "certs", "--out", str(folder), "--name", "localhost", "--name", "box", "--json")
    made = subprocess.run(command, env=environment_of({}), check=True, capture_output=True, text=True)
    return CertificateFiles(**{name: Path(path) for name, path in json.loads(made.stdout).items()})


@pytest.fixture(scope="session")
def tls_box(
    box: LiveBox, certificates: CertificateFiles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveBox]:
    """A second `kontextd serve` on the same data, which speaks TLS on a free port and leaves the work to the first."""
    files, folder = certificates, tmp_path_factory.mktemp("tls")
    options = ("--workers", "0", "--tls-cert", str(files.leaf), "--tls-key", str(files.leaf_key))
    with serving(folder, box.data, box.keys, TO_THE_STUDIO, *options) as served:
        yield served


@dataclass(frozen=True)
class Named:
    """The box as a client finds it that was changed in nothing: port 443 at fal's own names."""

    net: PrivateNet
    folder: Path
    certificates: CertificateFiles
    key: str

    def inside(self, away: tuple[str, ...] = ()) -> tuple[str, ...]:
        """What goes before a client's command. The names `away` lead where nobody answers."""
        hosts = self.folder / f"hosts-{'-'.join(away)}"
        here = [name for name in (*FAL_NAMES, "box", "localhost") if name not in away]
        lines = [" ".join(("127.0.0.1", *here)), *(f"{ELSEWHERE} {name}" for name in away)]
        hosts.write_text("".join(f"{line}\n" for line in lines))
        return self.net.inside(hosts)

    @property
    def environment(self) -> dict[str, str]:
        """The CA and the key: all that a client is given."""
        ca = str(self.certificates.ca)
        return {"FAL_KEY": self.key, "NODE_EXTRA_CA_CERTS": ca, "SSL_CERT_FILE": ca}


@pytest.fixture(scope="session")
def named(box: LiveBox, certificates: CertificateFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Named]:
    """The API process that `kontextd serve` starts, a second time beside the first: at 443 in the private network."""
    folder = tmp_path_factory.mktemp("named")
    try:
        with private_net() as net, listening(Named(net, folder, certificates, box.keys.own), box) as named:
            yield named
    except NoNamespaces as missing:
        fal_clients.absent(str(missing))


@contextmanager
def listening(named: Named, box: LiveBox) -> Iterator[Named]:
    files = named.certificates
    options = ("--port", "443", "--tls-cert", str(files.leaf), "--tls-key", str(files.leaf_key))
    command = (*named.inside(), *KONTEXTD, "api", "--data", str(box.data), *options)
    said, log = named.folder / "stdout.txt", named.folder / "stderr.txt"
    with running(command, environment_of({}), said, log) as process:
        wait = (sys.executable, "-c", _WAIT, "https://box/health", str(files.ca), str(START_S))
        waited = subprocess.run((*named.inside(), *wait), env=environment_of({}), capture_output=True, text=True)
        assert waited.returncode == 0, f"{waited.stderr}\n{log.read_text()}"
        assert process.poll() is None
        yield named
