"""Files as they are read: by anybody who knows the key, whole or in part. Knows HTTP; knows not what files hold.

What was uploaded may be a web page that wants to be run: it is never sniffed, and a browser gives it neither scripts
nor an origin.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from urllib.parse import quote

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from kontextd_server.api.documented import FILE
from kontextd_server.api.methods import is_head
from kontextd_server.api.parts import Api
from kontextd_server.api.threads import OffLoop
from kontextd_server.files import OpenFile, Span, StoredFile, parse_range
from kontextd_server.files.errors import InvalidRange
from kontextd_server.wire.error_answers import error_response

_SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Referrer-Policy": "no-referrer",
    "Accept-Ranges": "bytes",
    # A key never changes its content, but a file may be deleted.
    "Cache-Control": "private, max-age=300",
}


class FileRoutes:
    """The handler of GET, and with it HEAD."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def router(self) -> APIRouter:
        router = APIRouter(tags=["files"])
        router.get("/files/{key}", response_class=StreamingResponse, responses=FILE)(self.get)
        return router

    async def get(self, request: Request, key: str) -> Response:
        info = await self._api.off_loop.file(self._api.files.info, key)
        etag = f'"{info.sha256}"'
        headers = {**_SAFE, "ETag": etag, "Content-Disposition": _disposition(info.file_name)}
        if etag in _listed(request.headers.get("if-none-match")):
            return Response(status_code=304, headers=headers)
        try:
            span = _span(request, info, etag)
        except InvalidRange as error:
            refusal = error_response(error)
            refusal.headers["Content-Range"] = f"bytes */{info.size_bytes}"
            return refusal
        if span is not None:
            headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{info.size_bytes}"
        return await self._content(request, info, span, headers)

    async def _content(
        self, request: Request, info: StoredFile, span: Span | None, headers: dict[str, str]
    ) -> Response:
        sent = span or Span(0, info.size_bytes)
        headers |= {"Content-Length": str(sent.size_bytes), "Content-Type": info.content_type}
        status = 200 if span is None else 206
        if is_head(request.scope):
            return Response(status_code=status, headers=headers)
        off_loop = self._api.off_loop
        return _FileResponse(await off_loop.file(self._api.files.open, info.key), sent, status, headers, off_loop)


class _FileResponse(StreamingResponse):
    """Reads a mebibyte at a time in a thread, as fast as the client takes it, and closes the file whatever happens."""

    def __init__(self, file: OpenFile, span: Span, status: int, headers: dict[str, str], off_loop: OffLoop) -> None:
        super().__init__(_chunks(file, span, off_loop), status, headers)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()


async def _chunks(file: OpenFile, span: Span, off_loop: OffLoop) -> AsyncIterator[bytes]:
    chunks = file.chunks(span.start, span.stop)
    while chunk := await off_loop.file(next, chunks, b""):
        yield chunk


def _span(request: Request, info: StoredFile, etag: str) -> Span | None:
    """The part that is asked for, where what the client has is of this content."""
    condition = request.headers.get("if-range")
    if condition is not None and condition.strip() != etag:
        return None
    return parse_range(request.headers.get("range"), info.size_bytes)


def _listed(condition: str | None) -> list[str]:
    return [tag.strip().removeprefix("W/") for tag in (condition or "").split(",")]


def _disposition(file_name: str) -> str:
    """Shown where it can be; saved under the uploader's name for it."""
    return f"inline; filename*=UTF-8''{quote(file_name, safe='')}"
