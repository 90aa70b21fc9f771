"""The image, as far as it can be looked at without being built: its health check, and the command it starts."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from kontextd_server.certs import CertificateFiles, write_certificates
from kontextd_server.cli import build_parser
from kontextd_server.cli_options import given
from kontextd_server.settings import read_settings

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile.cuda").read_text(encoding="utf-8").replace("\\\n", " ")
SCRIPT = ROOT / "scripts/healthcheck.py"


class Page(BaseHTTPRequestHandler):
    """Answers /ready with the status that its server was given."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Answering)
        self.send_response(self.server.status if self.path == "/ready" else 404)
        self.end_headers()
        self.wfile.write(b"two workers")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class Answering(ThreadingHTTPServer):
    status = 200


@pytest.fixture
def server() -> Iterator[Answering]:
    with Answering(("127.0.0.1", 0), Page) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def checked(server: Answering, **environment: str) -> tuple[int, str]:
    ran = subprocess.run(
        [sys.executable, "-I", str(SCRIPT)],
        env={"KONTEXTD_PORT": str(server.server_port), **environment},
        capture_output=True,
        text=True,
    )
    assert ran.stderr == ""
    return ran.returncode, ran.stdout


def test_a_ready_server_is_healthy_and_one_without_a_worker_is_not(server: Answering) -> None:
    assert checked(server) == (0, "two workers\n")
    server.status = 503
    code, said = checked(server)
    assert code == 1
    assert said.endswith("/ready: 503 two workers\n")


def test_a_server_that_does_not_listen_is_not_healthy(server: Answering) -> None:
    server.shutdown()
    server.server_close()
    code, said = checked(server)
    assert code == 1
    assert "refused" in said


def test_a_proxy_of_the_environment_is_not_asked(server: Answering) -> None:
    assert checked(server, http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")[0] == 0


def test_a_server_that_speaks_tls_is_asked_so(server: Answering, tmp_path: Path) -> None:
    write_certificates(tmp_path, ["queue.fal.run"])
    files = CertificateFiles.in_folder(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.leaf, files.leaf_key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    assert checked(server, KONTEXTD_TLS_CERT=str(files.leaf)) == (0, "two workers\n")
    assert checked(server)[0] == 1


def test_the_health_check_imports_nothing_of_ours() -> None:
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "kontextd_server", "kontextd_models"} & set(ran.stdout.split())


def instruction(name: str) -> list[str]:
    """The words in brackets of an instruction's only, or last, occurrence."""
    return json.loads(re.findall(rf"^{name}\b[^\[\n]*(\[.*\])$", DOCKERFILE, re.MULTILINE)[-1])


def test_the_image_starts_a_server_that_keeps_its_data_in_the_volume_and_is_asked_where_it_listens() -> None:
    program, *words = [*instruction("ENTRYPOINT"), *instruction("CMD")]
    assert (program, words[0]) == ("kontextd", "serve")
    environment = dict(re.findall(r"\b(KONTEXTD_\w+)=(\S+)", DOCKERFILE.partition("\nENV ")[2]))
    settings = read_settings(environment, given(build_parser().parse_args(words)))
    assert settings.host == "0.0.0.0"
    assert {"/models", str(settings.data)} == set(instruction("VOLUME"))
    assert f"\nEXPOSE {settings.port}\n" in DOCKERFILE
    *_, script = instruction("HEALTHCHECK")
    assert f"\nCOPY scripts/healthcheck.py {script}\n" in DOCKERFILE
