"""What becomes of a job in a worker: result, files, log, errors. The real stores, an engine that computes nothing."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import WAIT_S, picture_uri, until
from engines import CachingEngine, GatedEngine, SlowFiles, Unwilling
from kontextd_server.files import FolderLimits, FolderStore, Label
from kontextd_server.files.errors import StoreUnavailable as FilesUnavailable
from kontextd_server.store import Job, JobKind, JobState, Outcome, Store, WorkerState
from kontextd_server.wire.outputs import StoredOutput
from kontextd_server.worker.null_engine import load_null
from null_worker import ScriptedEngine
from PIL import Image

Submit, Completed, Start, Look = Callable[..., str], Callable[[str], Job], Callable[..., object], Callable[[str], Job]


def output_of(store: Store, request_id: str) -> StoredOutput:
    result = store.views.result(request_id)
    assert result.job.outcome is Outcome.OK, result
    return StoredOutput.from_json(json.loads(result.body))


def read(files: FolderStore, key: str) -> Image.Image:
    with files.open(key) as file:
        return Image.open(io.BytesIO(b"".join(file.chunks())))


# Results.


def test_a_job_becomes_a_result_with_files_and_a_log(
    store: Store, files: FolderStore, submit: Submit, completed: Completed, start: Start
) -> None:
    start(report_every_s=0.0)
    picture = picture_uri(40, 24)
    request_id = submit("make it red", image_url=picture, seed=7, num_images=2, num_inference_steps=3)
    job = completed(request_id)
    output = output_of(store, request_id)
    sent = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
    for image in output.images:
        assert (image.width, image.height, image.content_type) == (40, 24, "image/png")
        kept = read(files, image.file_key)
        assert kept.format == "PNG"
        assert kept.tobytes()[3:] == sent.tobytes()[3:]  # the first pixel is the null engine's mark
        assert (files.info(image.file_key).size_bytes, files.info(image.file_key).owner) == (image.file_size, "anna")
    assert [image.file_name for image in output.images] == ["kontext-7.png", "kontext-8.png"]
    assert (output.seed, output.prompt, output.has_nsfw_concepts) == (7, "make it red", (False, False))
    assert output.timings.keys() >= {"inference", "fetch", "save"}
    assert output.report["seeds"] == [7, 8]
    assert (output.report["version"], output.report["size"]["planned"]) == ("null", [40, 24])
    assert (job.attempt, job.steps_total, job.worker) == (1, 6, "w1")
    lines = [line.message for line in store.views.logs(request_id)]
    assert [line.split("|")[2].split()[0] for line in lines] == [f"{n}/6" for n in range(1, 7)]


def test_a_jpeg_is_a_jpeg(store: Store, files: FolderStore, submit: Submit, completed: Completed, start: Start) -> None:
    start()
    completed(request_id := submit(output_format="jpeg"))
    (image,) = output_of(store, request_id).images
    assert (image.content_type, image.file_name[-5:]) == ("image/jpeg", ".jpeg")
    assert read(files, image.file_key).format == "JPEG"


@pytest.mark.parametrize(
    ("asked", "operator", "stay_s"),
    [(None, None, None), (None, 600.0, 600.0), (60.0, None, 60.0), (60.0, 600.0, 60.0), (6000.0, 600.0, 600.0)],
)
@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
def test_files_stay_as_long_as_the_caller_wants_but_never_longer_than_the_operator(
    store: Store,
    files: FolderStore,
    submit: Submit,
    completed: Completed,
    start: Start,
    asked: float | None,
    operator: float | None,
    stay_s: float | None,
) -> None:
    start(file_lifetime_s=operator)
    completed(request_id := submit(files_expire_s=asked))
    file = files.info(output_of(store, request_id).images[0].file_key)
    assert file.expires_at == (None if stay_s is None else pytest.approx(file.created_at + stay_s))


def test_a_job_tells_what_the_engine_did_for_it(
    store: Store, submit: Submit, completed: Completed, start: Start
) -> None:
    start(lambda: load_null(CachingEngine()))
    first, second = (completed(submit(num_images=n)) for n in (2, 1))
    assert (first.images, first.prompt_hit, first.reference_hit, first.merge_s) == (2, False, False, None)
    assert (second.images, second.prompt_hit, second.reference_hit, second.merge_s) == (1, True, False, 0.25)


@pytest.mark.parametrize("how", [{"transient": True}, {"sync_mode": True}])
def test_what_is_to_leave_no_trace_is_answered_as_a_data_uri(
    store: Store, files: FolderStore, submit: Submit, completed: Completed, start: Start, tmp_path: Path, how: dict
) -> None:
    worker = start()
    completed(request_id := submit(**how))
    (image,) = output_of(store, request_id).images
    assert image.file_key is None
    assert image.data_uri.startswith("data:image/png;base64,iVBORw0KGgo")
    assert files.usage().used_bytes == 0
    worker.end()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_an_uploaded_file_is_edited(
    store: Store, files: FolderStore, submit: Submit, completed: Completed, start: Start
) -> None:
    start()
    picture = base64.b64decode(picture_uri(32, 16).partition(",")[2])
    stored = files.put([picture], Label("a photo.png"))
    completed(request_id := submit(image_url=f"http://box:8000/files/{stored.key}"))
    assert output_of(store, request_id).images[0].width == 32


def test_previews_are_kept_for_streams_alone(store: Store, submit: Submit, start: Start, look_at: Look) -> None:
    engine = GatedEngine()
    start(engine.loaded)
    for kind in (JobKind.STREAM, JobKind.QUEUE):
        request_id = submit(kind=kind)
        until(lambda job=request_id: look_at(job).state is JobState.IN_PROGRESS)
        engine.let(2)
        until(lambda job=request_id: look_at(job).steps_done == 2)
        preview = store.views.preview(request_id)
        if kind is JobKind.STREAM:
            assert Image.open(io.BytesIO(preview.body)).format == "JPEG"
        else:
            assert preview is None
        engine.let(2)


def test_the_engine_is_used_by_one_thread_alone(submit: Submit, completed: Completed, start: Start) -> None:
    engine = GatedEngine()
    engine.let(8)
    start(engine.loaded)
    for request_id in [submit(), submit()]:
        completed(request_id)
    assert engine.threads == {"kontextd-engine"}


def test_jobs_whose_loras_are_merged_already_go_first(submit: Submit, completed: Completed, start: Start) -> None:
    engine = ScriptedEngine()
    jobs = [submit("first", lora_key="b"), submit("cold", lora_key="a"), submit("warm", lora_key="b")]
    start(lambda: load_null(engine))
    for request_id in jobs:
        completed(request_id)
    assert list(dict.fromkeys(prompt for prompt, _ in engine.steps if prompt)) == ["first", "warm", "cold"]


def test_the_next_job_starts_while_the_previous_is_being_saved(
    files: FolderStore, submit: Submit, completed: Completed, start: Start, look_at: Look
) -> None:
    slow, engine = SlowFiles(files), GatedEngine()
    start(engine.loaded, files=slow)
    first, second = submit(), submit()
    engine.let(6)
    assert slow.entered.wait(WAIT_S)
    until(lambda: engine.made == 6)
    assert look_at(first).state is look_at(second).state is JobState.IN_PROGRESS
    slow.go_on.set()
    engine.let(2)
    assert completed(first).outcome is completed(second).outcome is Outcome.OK


def test_a_worker_is_ready_when_it_has_made_its_short_edit(store: Store, start: Start) -> None:
    engine = ScriptedEngine()
    worker = start(lambda: load_null(engine))
    until(lambda: [row.state for row in store.workers.live()] == [WorkerState.READY])
    (row,) = store.workers.live()
    assert (row.id, row.device, row.model_version, row.lora_key) == ("w1", "null", "null", "")
    assert engine.steps == [("", 1)]
    worker.end()
    assert store.workers.all() == ()


# Failures.


@pytest.mark.parametrize(
    ("body", "status", "error_type", "loc"),
    [
        ({"num_inference_steps": 51}, 422, "less_than_equal", ["body", "num_inference_steps"]),
        ({"image_url": "data:image/png;base64,aGVsbG8="}, 422, "image_load_error", ["body", "image_url"]),
        ({"loras": [{"path": "https://example.com/a.safetensors"}]}, 422, "file_download_error", None),
    ],
)
def test_what_the_caller_can_mend_is_told_where_it_is(
    store: Store,
    submit: Submit,
    completed: Completed,
    start: Start,
    body: dict,
    status: int,
    error_type: str,
    loc: list[object] | None,
) -> None:
    start()
    request_id = submit(**body)
    job = completed(request_id)
    assert (job.outcome, job.http_status, job.error_type) == (Outcome.FAILED, status, error_type)
    (entry,) = json.loads(store.views.result(request_id).body)["detail"]
    assert entry["loc"] == (loc or ["body", "loras", 0, "path"])
    assert store.views.logs(request_id)[-1].level == "ERROR"


def test_out_of_memory_fails_the_job_and_the_worker_works_on(
    store: Store, submit: Submit, completed: Completed, start: Start
) -> None:
    start(lambda: load_null(ScriptedEngine()))
    job = completed(request_id := submit("run out of memory"))
    assert (job.http_status, job.error_type) == (500, "internal_server_error")
    assert "ran out of memory" in json.loads(store.views.result(request_id).body)["detail"][0]["msg"]
    assert completed(submit()).outcome is Outcome.OK


def test_a_bug_fails_the_job_without_telling_secrets_and_is_logged_under_its_id(
    store: Store, submit: Submit, completed: Completed, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    start(lambda: load_null(ScriptedEngine()))
    job = completed(request_id := submit("hit a bug"))
    assert (job.http_status, job.error_type) == (500, "internal_error")
    told = store.views.result(request_id).body.decode() + str(store.views.logs(request_id))
    assert "secret" not in told
    (record,) = [one for one in caplog.records if request_id in one.getMessage() and one.levelno == logging.ERROR]
    assert "secret of the house" in str(record.exc_info[1])
    assert completed(submit()).outcome is Outcome.OK


def test_a_broken_engine_ends_its_worker_and_another_runs_the_job(
    store: Store, submit: Submit, completed: Completed, start: Start, look_at: Look
) -> None:
    worker = start(lambda: load_null(ScriptedEngine()))
    request_id = submit("break the engine")
    worker.thread.join(WAIT_S)
    assert worker.codes == [1]
    assert look_at(request_id).state is JobState.IN_PROGRESS
    assert store.leases.sweep(lost_worker="w1").requeued == (request_id,)
    start()
    job = completed(request_id)
    assert (job.outcome, job.attempt, job.worker) == (Outcome.OK, 2, "w2")


def test_a_full_file_store_fails_the_job_cleanly(
    store: Store, submit: Submit, completed: Completed, start: Start, tmp_path: Path
) -> None:
    full = FolderStore(tmp_path / "full", FolderLimits(quota_bytes=1200))
    start(files=full)
    job = completed(request_id := submit(num_images=2))  # there is room for one
    assert (job.http_status, job.error_type) == (507, "internal_error")
    detail = json.loads(store.views.result(request_id).body)["detail"]
    assert detail == job.error_message
    assert "file store is full" in detail
    assert str(tmp_path) not in detail
    assert full.usage().used_bytes == 0
    assert completed(submit(sync_mode=True)).outcome is Outcome.OK


@pytest.mark.parametrize(("times", "status"), [(2, None), (3, 500)])
def test_a_file_store_that_is_away_is_asked_again_and_never_brings_the_job_back(
    files: FolderStore, submit: Submit, completed: Completed, start: Start, times: int, status: int | None
) -> None:
    away = Unwilling(files)
    away.fail_next("put", FilesUnavailable("not mounted"), times)
    start(files=away)
    assert completed(submit()).http_status == status  # a 503 would make clients send it again


def test_a_run_that_takes_too_long_is_stopped_with_fals_error(
    store: Store, submit: Submit, completed: Completed, start: Start, look_at: Look
) -> None:
    engine = GatedEngine()
    start(engine.loaded, run_limit_s=1.0)
    request_id = submit(num_inference_steps=50)
    engine.let(3)
    until(lambda: engine.made == 3 or look_at(request_id).state is JobState.COMPLETED, "for its time to run")
    time.sleep(1.2)  # longer than it may run, of which some is over
    engine.let(3)
    job = completed(request_id)
    assert (job.http_status, job.error_type) == (504, "generation_timeout")
    assert engine.made <= 4
    assert json.loads(store.views.result(request_id).body)["detail"][0]["type"] == "generation_timeout"


def test_an_engine_that_cannot_be_loaded_ends_the_worker(store: Store, start: Start) -> None:
    def load() -> None:
        raise RuntimeError("no engine today")

    worker = start(load)
    worker.thread.join(WAIT_S)
    assert worker.codes == [1]
    assert store.workers.all() == ()


def test_no_log_line_of_the_worker_shows_a_prompt(
    submit: Submit, completed: Completed, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "kontextd_server.worker")
    start()
    completed(submit("the emperor's new clothes"))
    assert re.search("attempt 1 begins", caplog.text)
    assert "emperor" not in caplog.text
