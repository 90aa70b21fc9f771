"""LitServe with the same null engine behind its one call, which waits for the result.

python lit_serve.py PORT
"""

from __future__ import annotations

import sys

import litserve
from edits import edit_in_memory


class Edits(litserve.LitAPI):
    def setup(self, device: str) -> None:
        pass

    def predict(self, asked: dict[str, object]) -> dict[str, object]:
        return edit_in_memory(asked)


if __name__ == "__main__":
    server = litserve.LitServer(Edits(), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
