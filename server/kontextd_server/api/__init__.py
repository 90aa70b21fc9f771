"""The API process: fal's contract over the job store and the file store. Knows HTTP and the stores; knows no engine.

    parts = ApiParts(store, store.watch(), files, tokens, grants, webhook_keys, check_webhook, Drain(config.drain_s))
    ApiServer(create_app(config, parts), Listening(port=8000), parts.drain).run()

submission.py puts a request into the queue, looks.py watches it, outcomes.py tells its end; the `*_routes` are fal's
calls over these. Nothing blocks the event loop: threads.py has a lane for each kind of call that could.
"""

from kontextd_server.api.app import create_app
from kontextd_server.api.config import ApiConfig, ApiLimits, Threads
from kontextd_server.api.drain import Drain
from kontextd_server.api.parts import ApiParts
from kontextd_server.api.serve import ApiServer, Listening

__all__ = [
    "ApiConfig",
    "ApiLimits",
    "ApiParts",
    "ApiServer",
    "Drain",
    "Listening",
    "Threads",
    "create_app",
]
