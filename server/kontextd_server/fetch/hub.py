"""Hub ids: which file of the hub `owner/name` or `owner/name/file` means. Knows the hub's two addresses; loads no file.

    {hub}/api/models/{owner/name}               its files, as `siblings`
    {hub}/{owner/name}/resolve/main/{file}      one of them

The id is the operator's to allow. The token is sent to the hub itself: where it redirects to, it is not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from urllib.parse import quote

from kontextd_server.fetch.addresses import Purpose
from kontextd_server.fetch.download import Credential, check_status
from kontextd_server.fetch.errors import DownloadFailed, NoHubFile
from kontextd_server.fetch.network import Deadline
from kontextd_server.fetch.urls import Target, parse
from kontextd_server.fetch.web import CREDENTIAL, Answer, Web
from kontextd_server.mirror import HUB_ID

_WEIGHTS = ".safetensors"
_OF_DIFFUSERS = "pytorch_lora_weights.safetensors"  # what its trainers call a LoRA
_MAX_LISTING = 8 * 2**20
_LISTING_S = 30.0
_MAX_KNOWN = 1000  # repositories
_TOLD = 10  # files in one message


class Hub:
    """Used by one thread at a time. What a repository holds is remembered as long as its files count as fresh."""

    def __init__(self, web: Web) -> None:
        self._web = web
        self._known: dict[str, tuple[float, str]] = {}  # until when, and which file

    @property
    def credential(self) -> Credential:
        token = self._web.config.hub_token
        if token is None:
            told = "A private or gated repository needs a token: KONTEXTD_HUB_TOKEN, which this server has not."
            return Credential({}, f"Check the id. {told}")
        told = "The token of this server (KONTEXTD_HUB_TOKEN) may not read it: its owner must have been let in there."
        return Credential({CREDENTIAL: f"Bearer {token}"}, f"Check the id. {told}")

    def target(self, hub_id: str, waiting: Callable[[], None]) -> Target:
        """Where the weights are that an id means. Raises `NoHubFile` and what a download raises."""
        found = HUB_ID.fullmatch(hub_id)
        assert found is not None, "the caller has recognised it"
        return parse(self._url(found[1], found[2] or self._file(found[1], waiting)))

    def _url(self, repository: str, name: str) -> str:
        return f"{self._web.config.hub}/{repository}/resolve/main/{quote(name)}"

    def _file(self, repository: str, waiting: Callable[[], None]) -> str:
        until, name = self._known.get(repository, (0.0, ""))
        if time.monotonic() >= until:
            name = self._only(self._listed(repository, waiting), repository)
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[repository] = (time.monotonic() + self._web.config.lora.fresh_s, name)
        return name

    def _listed(self, repository: str, waiting: Callable[[], None]) -> list[str]:
        target = parse(f"{self._web.config.hub}/api/models/{repository}")
        deadline = Deadline(min(_LISTING_S, self._web.config.lora.total_s), waiting)
        headers = {"Accept-Encoding": "identity", **self.credential.headers}
        with self._web.get(target, Purpose.LORA, deadline, headers) as answer:
            check_status(answer, self.credential)
            return _names(_body(answer), target)

    def _only(self, files: list[str], repository: str) -> str:
        weights = sorted(name for name in files if name.endswith(_WEIGHTS))
        if len(weights) == 1:
            return weights[0]
        if _OF_DIFFUSERS in weights:
            return _OF_DIFFUSERS
        if not weights:
            raise NoHubFile(f"{repository} holds no {_WEIGHTS} file. Use a repository of a LoRA in that format.")
        shown = ", ".join(self._reference(repository, name) for name in weights[:_TOLD])
        more = f", and {len(weights) - _TOLD} more" if len(weights) > _TOLD else ""
        raise NoHubFile(f"{repository} holds {len(weights)} {_WEIGHTS} files. Name one: {shown}{more}.")

    def _reference(self, repository: str, name: str) -> str:
        """What a request has to say for it: the URL where the name has characters that no id may have."""
        hub_id = f"{repository}/{name}"
        return hub_id if HUB_ID.fullmatch(hub_id) else self._url(repository, name)


def _body(answer: Answer) -> bytes:
    body = bytearray()
    for chunk in answer.chunks():
        body += chunk
        if len(body) > _MAX_LISTING:
            raise DownloadFailed(
                f"{answer.target} is longer than {_MAX_LISTING} bytes. Name the file: owner/name/FILE."
            )
    return bytes(body)


def _names(body: bytes, target: Target) -> list[str]:
    try:
        return [str(file["rfilename"]) for file in json.loads(body)["siblings"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DownloadFailed(f"{target} gave no list of files. Name the file: owner/name/FILE.") from error
