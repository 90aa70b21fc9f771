"""`kontextd certs`: make the private CA and the server's certificate, and say what clients have to do."""

from __future__ import annotations

import argparse
import json
import socket
from dataclasses import asdict
from pathlib import Path

from kontextd_server.picture_files import UsageError
from kontextd_server.settings import Settings
from kontextd_server.wire.hosts import HostNames


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", type=Path, default=Path("certs"), metavar="DIR", help="folder; default: ./certs")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="HOST",
        help="a name or address of this box, as clients will use it; may be repeated; default: its host name",
    )


def run(arguments: argparse.Namespace, _: Settings) -> int:
    from kontextd_server.certs import CertificateError, instructions, write_certificates

    fal_names = HostNames().all
    own = arguments.name or [socket.gethostname()]
    try:
        files = write_certificates(arguments.out, [*fal_names, *own])
    except CertificateError as error:
        raise UsageError(str(error)) from error
    if arguments.json:
        print(json.dumps({name: str(path.absolute()) for name, path in asdict(files).items()}))
    else:
        print(instructions(files, fal_names, _address(own)))
    return 0


def _address(own: list[str]) -> str:
    """The first of the box's names that is an address, as hosts files want one."""
    return next((name for name in own if name.replace(".", "").isdigit() or ":" in name), "<address of the box>")
