"""A whole job with the real engine: a tiny random model, the real stores, a whole worker in threads."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import picture_uri, until
from kontextd_models import Done, EditRequest, EngineConfig
from kontextd_models.intake import open_image
from kontextd_server.files import FolderStore
from kontextd_server.store import Job, JobKind, Outcome, Store, WorkerState
from kontextd_server.wire.outputs import StoredOutput
from kontextd_server.worker import LoadedEngine, load_kontext
from PIL import Image

Submit, Completed, Start = Callable[..., str], Callable[[str], Job], Callable[..., object]


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    sums = tmp_path_factory.mktemp("sums") / "model_sums.json"
    return load_kontext(EngineConfig(model=tiny_folder, device="cpu"), sums)


def test_an_edit_through_the_worker_is_the_edit_of_the_engine(
    store: Store, files: FolderStore, submit: Submit, completed: Completed, start: Start, loaded: LoadedEngine
) -> None:
    start(lambda: loaded)
    picture = picture_uri(64, 64)
    words = {"num_inference_steps": 3, "seed": 7, "enable_safety_checker": False}
    job = completed(request_id := submit("make it red", image_url=picture, kind=JobKind.STREAM, **words))
    assert job.outcome is Outcome.OK, store.views.result(request_id)
    output = StoredOutput.from_json(json.loads(store.views.result(request_id).body))
    with files.open(output.images[0].file_key) as file:
        through_worker = Image.open(io.BytesIO(b"".join(file.chunks())))
    image = open_image(base64.b64decode(picture.partition(",")[2]))
    *_, done = loaded.engine.edit(EditRequest(image, "make it red", 3, 7, enable_safety_checker=False))
    assert isinstance(done, Done)
    assert np.array_equal(np.asarray(through_worker), np.asarray(done.images[0]))
    assert len(store.views.logs(request_id)) == 3
    assert output.report["version"] == loaded.version
    assert job.inference_s == output.timings["inference"] > 0


def test_what_the_engine_refuses_is_answered_in_fals_words(
    store: Store, submit: Submit, completed: Completed, start: Start, loaded: LoadedEngine
) -> None:
    start(lambda: loaded)
    until(lambda: WorkerState.READY in {row.state for row in store.workers.live()})
    assert store.workers.live()[0].device == "cpu, float32"
    job = completed(request_id := submit(image_url=picture_uri(200, 20)))
    (entry,) = json.loads(store.views.result(request_id).body)["detail"]
    assert (job.http_status, entry["type"]) == (422, "image_aspect_ratio_error")
    assert entry["loc"] == ["body", "image_url"]
