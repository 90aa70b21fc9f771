"""A caller of the queue, in fal's words. Knows HTTP; knows no processes."""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image

from .processes import until

ENDPOINT = "fal-ai/flux-kontext-lora"
_seeds = itertools.count(random.randrange(2**40))  # each job has another, which names its files
Json = dict[str, Any]  # Any: decoded JSON


def picture(side: int = 16) -> bytes:
    """Noise, as a JPEG: a PNG of it is about as long as its pixels."""
    made = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.randbytes(3 * side * side)).save(made, "JPEG", quality=25)
    return made.getvalue()


def picture_uri() -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture()).decode()}"


def body(prompt: str, **fields: object) -> Json:
    return {"image_url": picture_uri(), "prompt": prompt, "num_inference_steps": 4, "seed": next(_seeds), **fields}


@dataclass
class Caller:
    """Somebody with a key. The connection is kept open between calls."""

    url: str
    key: str
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Key {self.key}"}, timeout=120, trust_env=False, verify=False
        )

    def submit(self, prompt: str = "nothing", *, webhook: str | None = None, **fields: object) -> str:
        """Returns the request id."""
        params = {"fal_webhook": webhook} if webhook else {}
        answer = self.http.post(f"/queue/{ENDPOINT}", json=body(prompt, **fields), params=params)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    def upload(self, content: bytes) -> str:
        """Returns the URL of the file."""
        urls = self.http.post("/rest/storage/upload/initiate", json={"file_name": "in", "content_type": "image/jpeg"})
        assert self.http.put(urls.json()["upload_url"], content=content).status_code == 200
        return str(urls.json()["file_url"])

    def status(self, request_id: str) -> Json:
        answer = self.http.get(f"{_request(request_id)}/status", params={"logs": "1"})
        assert answer.status_code in (200, 202), answer.text
        return dict(answer.json())

    def is_completed(self, request_id: str) -> bool:
        return bool(self.status(request_id)["status"] == "COMPLETED")

    def result(self, request_id: str) -> httpx.Response:
        return self.http.get(_request(request_id))

    def cancel(self, request_id: str) -> int:
        return self.http.put(f"{_request(request_id)}/cancel").status_code

    def completed(self, request_id: str) -> httpx.Response:
        """The result, once the job has ended."""
        until(lambda: self.is_completed(request_id), f"the end of {request_id}")
        return self.result(request_id)

    def made(self, result: httpx.Response) -> bytes:
        """The first image of a result, as it is served."""
        assert result.status_code == 200, result.text
        answer = self.http.get(result.json()["images"][0]["url"])
        assert answer.status_code == 200, answer.text
        with Image.open(io.BytesIO(answer.content)) as opened:
            opened.load()
        return answer.content


def detail(answer: httpx.Response) -> tuple[int, str]:
    """Status and error type of a refusal."""
    return answer.status_code, str(json.loads(answer.content).get("error_type"))


def _request(request_id: str) -> str:
    return f"/queue/{ENDPOINT}/requests/{request_id}"
