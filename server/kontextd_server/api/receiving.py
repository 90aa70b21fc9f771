"""The body of an upload on its way into the file store. Knows chunks and threads; knows no addresses and no keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeVar

from starlette.requests import Request

from kontextd_server.api.threads import OffLoop
from kontextd_server.wire.errors import BadRequest

_BATCH_BYTES = 2**20  # a thread is worth its while for a mebibyte, not for each chunk from the network

Kept = TypeVar("Kept", covariant=True)


class Writer(Protocol[Kept]):
    """A `FileWriter` or a `PartWriter`."""

    def __exit__(self, kind: None, error: None, trace: None, /) -> bool | None: ...

    def write(self, chunk: bytes) -> None: ...

    def commit(self) -> Kept: ...


async def receive(request: Request, off_loop: OffLoop, begin: Callable[[], Writer[Kept]]) -> Kept:
    """Write the body as it comes, a bounded part of it in memory. Raises what the file store raises, `BadRequest`,
    and `ClientDisconnect`; then nothing is left behind."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise BadRequest(f"the body has the Content-Encoding {encoding[:50]!r}; send it as it is.")
    writer = await off_loop.file(begin)
    try:
        async for batch in _batches(request):
            await off_loop.file(writer.write, batch)
        return await off_loop.file(writer.commit)
    finally:
        await off_loop.file(writer.__exit__, None, None, None)


async def _batches(request: Request) -> AsyncIterator[bytes]:
    batch = bytearray()
    async for chunk in request.stream():
        batch += chunk
        if len(batch) >= _BATCH_BYTES:
            yield bytes(batch)
            batch.clear()
    if batch:
        yield bytes(batch)
