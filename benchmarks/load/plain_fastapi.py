"""What one writes first: FastAPI, a queue in memory, one thread that works. The same calls and the same null engine.

python plain_fastapi.py PORT
"""

from __future__ import annotations

import queue
import sys
import threading
from dataclasses import dataclass, field
from uuid import uuid4

import uvicorn
from edits import edit_in_memory
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from starlette.responses import JSONResponse

APP = "/fal-ai/flux-kontext-lora"


class Input(BaseModel):
    image_url: str
    prompt: str
    num_inference_steps: int = 30


@dataclass
class Job:
    asked: dict[str, object]
    state: str = "IN_QUEUE"
    result: dict[str, object] | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Jobs:
    """One thread takes one after the other, once `go` was called."""

    def __init__(self) -> None:
        self.known: dict[str, Job] = {}
        self._waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def go(self) -> None:
        self._thread.start()

    def put(self, asked: Input) -> tuple[str, Job]:
        request_id, job = str(uuid4()), Job(asked.model_dump())
        self.known[request_id] = job
        self._waiting.put(job)
        return request_id, job

    def _work(self) -> None:
        while True:
            job = self._waiting.get()
            job.state = "IN_PROGRESS"
            job.result = edit_in_memory(job.asked)
            job.state = "COMPLETED"
            job.done.set()


def application() -> FastAPI:
    app, jobs = FastAPI(), Jobs()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/go")
    async def go() -> dict[str, str]:
        jobs.go()
        return {"status": "ok"}

    @app.post(f"/queue{APP}")
    async def submit(asked: Input) -> dict[str, str]:
        return {"status": "IN_QUEUE", "request_id": jobs.put(asked)[0]}

    @app.get(f"/queue{APP}/requests/{{request_id}}/status")
    async def status(request_id: str) -> JSONResponse:
        job = found(request_id)
        return JSONResponse({"status": job.state, "request_id": request_id}, 200 if job.result else 202)

    @app.get(f"/queue{APP}/requests/{{request_id}}")
    async def result(request_id: str) -> dict[str, object]:
        job = found(request_id)
        if job.result is None:
            raise HTTPException(400, "Request is still in progress")
        return job.result

    @app.post(APP)
    def run(asked: Input) -> dict[str, object]:
        _, job = jobs.put(asked)
        job.done.wait()
        assert job.result is not None
        return job.result

    def found(request_id: str) -> Job:
        if request_id not in jobs.known:
            raise HTTPException(404)
        return jobs.known[request_id]

    return app


if __name__ == "__main__":
    uvicorn.run(application(), port=int(sys.argv[1]), access_log=False, log_level="warning")
