"""Options that stand for a setting: given on the command line, they go before the variable. Knows argparse only."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from kontextd_server.settings import variable

_DEST = "setting_"
_METAVARS = {
    "model": "DIR",
    "data": "DIR",
    "files": "DIR",
    "database": "URL",
    "host": "ADDRESS",
    "port": "PORT",
    "workers": "N",
    "tls_cert": "FILE",
    "tls_key": "FILE",
    "public_url": "URL",
    "device": "NAME",
    "presets": "FILE",
}
_HELP = {
    "model": "diffusers folder; default: the demonstration model",
    "device": "auto, cpu, cuda or cuda:1",
    "presets": "table of presets; default: the model's own",
    "data": "folder of jobs, files and secrets; default: ~/.local/share/kontextd",
    "database": "job store; default: SQLite in the data folder",
    "files": "folder of files; default: files in the data folder",
    "host": "address to listen at; default: 127.0.0.1",
    "port": "port to listen at; default: 8000; 0 is any that is free",
    "workers": "worker processes; default: one a GPU, or one on the CPU",
    "tls_cert": "certificate chain in PEM: the server then speaks TLS",
    "tls_key": "private key of the certificate, in PEM",
    "public_url": "address in the URLs that are handed out; default: the caller's own",
}


def add_settings(parser: argparse.ArgumentParser, *names: str) -> None:
    """Options named after fields of `Settings`."""
    for name in names:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=_DEST + name,
            metavar=_METAVARS[name],
            help=f"{_HELP[name]} ({variable(name)})",
        )


def add_action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, *settings: str
) -> argparse.ArgumentParser:
    """One action of a command such as `keys`, with the options of these settings and `--json`."""
    parser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:])
    add_settings(parser, *settings)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def given(arguments: argparse.Namespace) -> Mapping[str, str]:
    """Field → text, of the options that were given."""
    return {
        name.removeprefix(_DEST): value
        for name, value in vars(arguments).items()
        if name.startswith(_DEST) and value is not None
    }


def as_environment(options: Mapping[str, str]) -> Mapping[str, str]:
    """The same for a child process."""
    return {variable(name): text for name, text in options.items()}
