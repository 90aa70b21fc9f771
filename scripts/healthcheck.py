#!/usr/bin/env python3
"""Is the server of this container ready? For HEALTHCHECK in Dockerfile.cuda: one GET of /ready.

Knows two settings of the server: its port, and whether it speaks TLS. Imports the standard library only: no torch.
Exit code 0 where a worker can take a job, else 1 with the reason on stdout, which `docker inspect` shows.
"""

from __future__ import annotations

import os
import ssl
import sys
from collections.abc import Mapping
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

TIMEOUT_S = 5


def main(environment: Mapping[str, str]) -> int:
    # The server beside us, asked by a name that is not on its certificate: there is nobody in between to be fooled by.
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    scheme = "https" if environment.get("KONTEXTD_TLS_CERT") else "http"
    url = f"{scheme}://127.0.0.1:{environment.get('KONTEXTD_PORT') or 8000}/ready"
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=trusting))  # no proxy of the environment
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            said = answer.read().decode()
    except HTTPError as error:
        print(f"{url}: {error.code} {error.read().decode(errors='replace')}")
        return 1
    except (OSError, HTTPException) as error:  # URLError is an OSError
        print(f"{url}: {error}")
        return 1
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main(os.environ))
