"""uvicorn's httptools protocol with the bound on headers that it lacks. Knows bytes; knows no application.

Without it anybody, key or no key, can fill the memory with a header that never ends. h11 has a bound of its own.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# As h11's, and well over fal's longest headers; what one read of the socket brings comes on top.
MAX_HEADER_BYTES = 65_536


class BoundedHttp(HttpToolsProtocol):
    """Answers 400 and closes where a request line with its headers does not end in time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # Any: uvicorn's own arguments
        super().__init__(*args, **kwargs)
        self._is_amid_headers = False
        self._header_bytes = 0

    def on_message_begin(self) -> None:
        self._is_amid_headers, self._header_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_amid_headers = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        was_amid_headers = self._is_amid_headers
        super().data_received(data)
        if was_amid_headers and self._is_amid_headers:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The headers are longer than the {MAX_HEADER_BYTES} bytes allowed.")
