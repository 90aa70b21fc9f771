"""What is asked for in these measurements, and the engine that answers: the null engine, at a pace the prompt says."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Generator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from kontextd_models import Done, EditRequest, Step
from kontextd_server.pictures import PictureFormat, encode, encode_png
from kontextd_server.worker.null_engine import NullEngine
from PIL import Image

SIDE = 64  # small: what encoding costs is measured elsewhere (png.py)


def body(name: str, *, steps: int = 30, step_s: float = 0.0) -> bytes:
    """A request with its picture in it, as JSON."""
    picture = encode_png(Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB"))
    asked = {
        "image_url": f"data:image/png;base64,{base64.b64encode(picture).decode()}",
        "prompt": json.dumps({"name": name, "step_s": step_s}),
        "num_inference_steps": steps,
    }
    return json.dumps(asked).encode()


@dataclass(frozen=True)
class PacedEngine:
    """Writes down when it began and ended, in seconds of the clock that all processes of a machine share."""

    times: Path | None = None

    def edit(self, request: EditRequest) -> Generator[Step | Done, None, None]:
        began = time.monotonic()
        asked = json.loads(request.prompt) if request.prompt else {"name": "warm-up", "step_s": 0.0}
        for event in NullEngine(asked["step_s"]).edit(request):
            if isinstance(event, Done) and self.times is not None:
                line = {"name": asked["name"], "began": began, "done": time.monotonic()}
                with self.times.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            yield event


def edit_in_memory(asked: dict[str, object]) -> dict[str, object]:
    """The same work without queue, files and database: what the servers compared with do for a request."""
    data = base64.b64decode(str(asked["image_url"]).partition(",")[2])
    request = EditRequest(
        image=Image.open(BytesIO(data)),
        prompt=str(asked["prompt"]),
        num_inference_steps=int(str(asked["num_inference_steps"])),
    )
    (done,) = (event for event in PacedEngine().edit(request) if isinstance(event, Done))
    picture = encode(done.images[0], PictureFormat.PNG)
    uri = f"data:{picture.content_type};base64,{base64.b64encode(picture.data).decode()}"
    return {"images": [{"url": uri}], "seed": done.seeds[0], "timings": dict(done.timings), "prompt": request.prompt}
