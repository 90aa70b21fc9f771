"""A network of our own, in which fal's names lead to us and nothing leads elsewhere. Knows namespaces; knows no client.

The network is a namespace with loopback alone, where port 443 is free whatever the machine serves. Each command has a
mount namespace besides, in which /etc/hosts is a file of the test's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# A plain user becomes root in a user namespace of his own, where the machine lets him.
_BECOME_ROOT = ("--user", "--map-root-user")
_JOIN_AS_ROOT = ("--user", "--preserve-credentials")
_HOLD = "ip link set lo up && echo up && exec cat"  # until its input ends, which it does with us
_WITH_HOSTS = 'mount --bind "$0" /etc/hosts && exec "$@"'
_PIPE = subprocess.PIPE
_TOOLS = ("unshare", "nsenter", "ip", "mount")


class NoNamespaces(Exception):
    """This machine gives us no network of our own; the message says why."""


@dataclass(frozen=True)
class PrivateNet:
    """`pid` is a process that keeps the network there."""

    pid: int

    def inside(self, hosts: Path) -> tuple[str, ...]:
        """What goes before a command for it to run in this network, with `hosts` as its /etc/hosts."""
        join = () if os.geteuid() == 0 else _JOIN_AS_ROOT
        into = ("nsenter", f"--target={self.pid}", *join, "--net")
        return (*into, "unshare", "--mount", "sh", "-c", _WITH_HOSTS, str(hosts))


@contextmanager
def private_net() -> Iterator[PrivateNet]:
    """Raises `NoNamespaces`."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise NoNamespaces(f"{' and '.join(missing)} is not installed: apt-get install util-linux iproute2")
    become = () if os.geteuid() == 0 else _BECOME_ROOT
    command = ("unshare", *become, "--net", "sh", "-c", _HOLD)
    with subprocess.Popen(command, stdin=_PIPE, stdout=_PIPE, stderr=_PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stderr
        try:
            if holder.stdout.readline() != "up\n":
                told = holder.stderr.read().strip()
                raise NoNamespaces(f"neither root nor user namespaces for a network of our own: {told}")
            yield PrivateNet(holder.pid)
        finally:
            holder.kill()
