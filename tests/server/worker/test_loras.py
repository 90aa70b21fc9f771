"""LoRAs of a job, from the paths that were sent to what is told of them: a tiny model, a whole worker, real stores."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny_lora
from conftest import picture_uri
from kontextd_models import Done, EditRequest, EngineConfig, LoraReport, Step
from kontextd_server.files import FolderStore, Label
from kontextd_server.mirror import Mirror
from kontextd_server.store import Job, Outcome, Store
from kontextd_server.wire.outputs import StoredOutput
from kontextd_server.worker import LoadedEngine, StageDeadlines, load_kontext
from kontextd_server.worker.null_engine import NullEngine, load_null
from kontextd_server.worker.stages import Stage, StageWatch, allowed_s

Submit, Completed, Start = Callable[..., str], Callable[[str], Job], Callable[..., object]
Edit = Callable[..., StoredOutput]


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    sums = tmp_path_factory.mktemp("sums") / "model_sums.json"
    return load_kontext(EngineConfig(model=tiny_folder, device="cpu"), sums)


@pytest.fixture
def studio(tmp_path: Path) -> Path:
    """The root of that name, with ink, and with wash, of whose tensors the model has no place for seven."""
    folder = tmp_path / "studio"
    (folder / "styles").mkdir(parents=True)
    tiny_lora.write(folder / "styles" / "ink.safetensors", seed=1)
    tiny_lora.write(folder / "wash.safetensors", seed=2, unknown=7)
    return folder


@pytest.fixture
def submit_tiny(submit: Submit) -> Submit:
    words = {"image_url": picture_uri(64, 64), "num_inference_steps": 1, "seed": 7, "enable_safety_checker": False}
    return lambda *loras, **more: submit(
        "make it red", **words, loras=[{"path": path, "scale": scale} for path, scale in loras], **more
    )


@pytest.fixture
def edit(store: Store, submit_tiny: Submit, completed: Completed, start: Start, loaded: LoadedEngine) -> Edit:
    """The output of an edit with LoRAs of these paths and scales."""
    start(lambda: loaded)

    def run(*loras: tuple[str, float], **more: object) -> StoredOutput:
        request_id = submit_tiny(*loras, **more)
        assert completed(request_id).outcome is Outcome.OK, store.views.result(request_id)
        return StoredOutput.from_json(json.loads(store.views.result(request_id).body))

    return run


def picture(files: FolderStore, output: StoredOutput) -> bytes:
    with files.open(output.images[0].file_key) as file:
        return b"".join(file.chunks())


def told(output: StoredOutput) -> list[tuple[str, int, int]]:
    return [(one["path"], one["matched"], one["total"]) for one in output.report["loras"]]


# What paths mean.


def test_one_file_is_the_same_lora_by_every_name(edit: Edit, files: FolderStore, studio: Path, tmp_path: Path) -> None:
    """In a root, uploaded, mirrored, as a data URI: with it the picture is another one, and always the same."""
    file = studio / "styles" / "ink.safetensors"
    upload = files.put([file.read_bytes()], Label("ink.safetensors"))
    mirror = Mirror(tmp_path / "files")
    paths = ["studio:styles/ink", f"http://box:8000/files/{upload.key}", "https://cdn.test/ink?sig=1", "owner/ink"]
    for url in paths[2:]:
        mirror.add(url, file)
    base = picture(files, edit())
    with_ink = []
    for path in paths:
        output = edit((path, 1.0))
        assert told(output) == [(path, 6, 6)]
        with_ink.append(picture(files, output))
    assert len(set(with_ink)) == 1
    assert with_ink[0] != base
    assert picture(files, edit()) == base


def test_scale_0_is_read_and_checked_and_changes_nothing(edit: Edit, files: FolderStore, studio: Path) -> None:
    output = edit(("studio:wash", 0.0))
    assert told(output) == [("studio:wash", 6, 13)]
    assert picture(files, output) == picture(files, edit())


def test_order_does_not_matter_and_scales_do(edit: Edit, files: FolderStore, studio: Path) -> None:
    ink, wash = ("studio:styles/ink", 0.5), ("studio:wash", 1.5)
    there, back = edit(ink, wash), edit(wash, ink)
    assert [path for path, _, _ in told(back)] == ["studio:wash", "studio:styles/ink"]
    assert picture(files, there) == picture(files, back)
    assert picture(files, edit(("studio:styles/ink", 1.0), wash)) != picture(files, there)


# What is told.


def test_a_result_tells_how_much_of_each_lora_fitted(edit: Edit, studio: Path) -> None:
    output = edit(("studio:wash", 1.0), ("studio:styles/ink", 0.3))
    wash, ink = output.report["loras"]
    assert ink == {"path": "studio:styles/ink", "matched": 6, "total": 6, "warnings": []}
    (warning,) = wash["warnings"]
    assert warning.startswith(
        "7 of its 13 tensors have no place in this model: transformer.no_such_block.0.lora_A.weight,"
    )
    assert warning.endswith("and 2 more.")
    assert output.timings["merge"] > 0
    assert output.report["cache_hits"]["loras"] is False
    assert edit(("studio:styles/ink", 0.3), ("studio:wash", 1.0)).report["cache_hits"]["loras"] is True


def test_a_job_tells_what_its_loras_cost(
    edit: Edit, store: Store, studio: Path, completed: Completed, submit_tiny: Submit
) -> None:
    cold, hot, base = (completed(submit_tiny(*loras)) for loras in ([("studio:wash", 1.0)], [("studio:wash", 1.0)], []))
    assert (cold.lora_hit, hot.lora_hit, base.lora_hit) == (False, True, None)
    assert cold.lora_load_s > 0
    assert cold.merge_s > 0
    assert (hot.merge_s, base.lora_load_s) == (None, None)
    assert base.merge_s > 0  # the base's weights again


def test_the_log_of_a_job_has_a_line_a_lora_without_what_a_query_holds(
    store: Store, submit_tiny: Submit, completed: Completed, edit: Edit, studio: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    url = "https://cdn.test/wash.safetensors?X-Amz-Signature=topsecret"
    Mirror(tmp_path / "files").add(url, studio / "wash.safetensors")
    completed(request_id := submit_tiny((url, 0.5), ("studio:styles/ink", 1.0)))
    lines = [(line.level, line.message) for line in store.views.logs(request_id)]
    first = "loras[0] (https://cdn.test/wash.safetensors): 6 of 13 tensors used (diffusers), scale 0.5"
    assert ("INFO", first) in lines
    assert ("INFO", "loras[1] (studio:styles/ink): 6 of 6 tensors used (diffusers), scale 1") in lines
    (warning,) = [message for level, message in lines if level == "WARN"]
    assert "7 of its 13 tensors" in warning
    assert f"request {request_id}: {first}" in caplog.text
    assert "topsecret" not in caplog.text + str(lines)


def test_a_job_that_is_to_leave_no_trace_leaves_no_name_of_a_lora(
    store: Store, submit_tiny: Submit, completed: Completed, edit: Edit, studio: Path
) -> None:
    completed(request_id := submit_tiny(("studio:wash", 1.0), transient=True))
    lines = [line.message for line in store.views.logs(request_id)]
    assert "loras[0]: 6 of 13 tensors used (diffusers), scale 1" in lines
    assert "wash" not in str(lines)


@dataclass
class Listening:
    """The engine, with what it told of LoRAs last."""

    loaded: LoadedEngine
    reports: tuple[LoraReport, ...] = ()

    def edit(self, request: EditRequest) -> Generator[Step | Done, None, None]:
        for event in self.loaded.engine.edit(request):
            if isinstance(event, Done):
                self.reports = event.loras
            yield event


def test_a_file_that_was_read_is_not_read_again_wherever_it_was_put_for_the_next_job(
    submit_tiny: Submit, completed: Completed, start: Start, loaded: LoadedEngine, files: FolderStore, tmp_path: Path
) -> None:
    file = tiny_lora.write(tmp_path / "once.safetensors", seed=77)
    upload = files.put([file.read_bytes()], Label("once.safetensors"))
    engine = Listening(loaded)
    start(lambda: replace(loaded, engine=engine))
    for was_cached in (False, True):
        assert completed(submit_tiny((f"http://box:8000/files/{upload.key}", 1.0))).outcome is Outcome.OK
        assert [report.was_cached for report in engine.reports] == [was_cached]


# What goes wrong.


BAD = [
    ("studio:nothing", "file_download_error", "the root 'studio' holds no such file"),
    ("studoi:wash", "file_download_error", "no LoRA root 'studoi'; it has: studio"),
    ("studio:../files/x", "file_download_error", "is no path in a root"),
    ("owner/name", "file_download_error", "kontextd mirror add owner/name FILE"),
    ("https://cdn.test/x.safetensors", "file_download_error", "kontextd mirror add https://cdn.test/x"),
    ("studio:page", "file_download_error", "an HTML page"),
    ("studio:wide", "value_error", "studio:wide"),
    ("studio:sdxl", "value_error", "SDXL"),
]


def test_a_lora_that_cannot_be_used_is_told_by_its_place_and_the_next_job_runs(
    store: Store, submit_tiny: Submit, completed: Completed, edit: Edit, files: FolderStore, studio: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The place in the request as it was sent, one of scale 0 before it counted."""
    (studio / "page.safetensors").write_bytes(b"<!doctype html>")
    tiny_lora.write(studio / "wide.safetensors", width=48)
    tiny_lora.write(studio / "sdxl.safetensors", modules=["unet.down_blocks.1.attentions.0.proj_in"])
    before = picture(files, edit())
    for path, error_type, said in BAD:
        request_id = submit_tiny(("studio:wash", 0.0), ("studio:styles/ink", 1.0), (path, 1.0))
        assert completed(request_id).http_status == 422, path
        (entry,) = json.loads(store.views.result(request_id).body)["detail"]
        assert (entry["loc"], entry["type"]) == (["body", "loras", 2, "path"], error_type), path
        assert said in entry["msg"]
        assert str(tmp_path) not in str(entry)
    assert picture(files, edit()) == before


def test_a_file_of_a_root_that_changed_is_noticed(edit: Edit, files: FolderStore, studio: Path) -> None:
    file = studio / "styles" / "ink.safetensors"
    first = picture(files, edit(("studio:styles/ink", 1.0)))
    tiny_lora.write(file, seed=99)
    second = picture(files, edit(("studio:styles/ink", 1.0)))
    assert second != first
    tiny_lora.write(file, seed=1)
    assert picture(files, edit(("studio:styles/ink", 1.0))) == first


def test_an_engine_without_loras_is_told_of_none(
    store: Store, submit_tiny: Submit, completed: Completed, start: Start, studio: Path
) -> None:
    start(load_null)
    completed(request_id := submit_tiny(("studio:wash", 1.0)))
    assert json.loads(store.views.result(request_id).body)["report"]["loras"] == []


# Time.


@pytest.mark.parametrize(
    ("count", "size_bytes", "more_s"),
    [
        (0, 0, 0.0),
        (1, 1, 0.0),
        (16, 4 * 2**30, 0.0),
        (17, 1, 300.0),
        (3, 4 * 2**30 + 1, 300.0),
        (64, 40 * 2**30, 2700.0),
    ],
)
def test_a_large_set_has_more_time_to_be_merged(count: int, size_bytes: int, more_s: float) -> None:
    assert StageDeadlines().more_merge_s(count, size_bytes) == more_s


@dataclass
class SlowMerging:
    """Takes three seconds before its first step."""

    def edit(self, request: EditRequest) -> Generator[Step | Done, None, None]:
        if request.loras:
            time.sleep(3)
        yield from NullEngine().edit(request)


def test_a_worker_that_merges_a_large_set_does_not_count_as_hung(
    submit_tiny: Submit, completed: Completed, start: Start, studio: Path
) -> None:
    short = StageDeadlines(merge_s=1.0, compile_s=0.1, step_s=0.1)
    worker = start(lambda: load_null(SlowMerging()), deadlines=short)
    job = completed(submit_tiny(*[("studio:styles/ink", 1.0)] * 161))
    assert (job.outcome, job.attempt) == (Outcome.OK, 1)
    worker.end()
    assert worker.codes == [0]


def test_the_time_for_a_large_set_ends_with_its_first_step() -> None:
    now = [0.0]
    watch = StageWatch(allowed_s(StageDeadlines(merge_s=10, compile_s=20, step_s=30)), lambda: now[0])
    watch.enter(Stage.PREPARE, more_s=40.0)
    now[0] = 99.0
    assert not watch.is_overdue
    now[0] = 101.0
    assert watch.is_overdue
    watch.enter(Stage.STEP)
    now[0] = 132.0
    assert watch.is_overdue
