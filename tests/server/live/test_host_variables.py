"""fal-client for Python by its host variables, over TLS: all but uploads, which go to fixed names."""

from __future__ import annotations

import json

import fal_clients
import pytest
from kontextd_server.certs import CertificateFiles

from .box import LiveBox
from .expected import edit_of, endless
from .python import EVERY_CALL, check_calls
from .studio import Studio


@pytest.mark.parametrize("is_async", [False, True], ids=["blocking", "async"])
def test_python_makes_every_call_but_uploads_by_its_host_variables(
    is_async: bool, tls_box: LiveBox, studio: Studio, certificates: CertificateFiles
) -> None:
    host = f"localhost:{tls_box.port}"
    variables = {
        "FAL_KEY": tls_box.keys.own,
        "FAL_RUN_HOST": host,
        "FAL_QUEUE_RUN_HOST": f"{host}/queue",
        "SSL_CERT_FILE": str(certificates.ca),
    }
    asked = {"async": is_async, "input": edit_of(studio), "endless": endless(studio), "uploads": None}
    told = fal_clients.run_python(EVERY_CALL.read_text(), variables, json.dumps(asked), timeout_s=300)
    check_calls(told, tls_box, files=f"https://{host}/files/", queue=f"https://{host}/queue/")
