"""The settings of jobs and workers: where things lie, how long they last, when a stage counts as hung."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from kontextd_server.settings.rows import MIB, checked, count, flag, names, path, positive, seconds, setting

if TYPE_CHECKING:
    from kontextd_server.files import FolderLimits
    from kontextd_server.store import Policy
    from kontextd_server.worker import DeliveryPolicy, SupervisorPolicy, WorkerPolicy

_DAY_S = 86400.0


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(seconds(part) for part in names(text))


def _database(url: str) -> None:
    if not url.startswith(("sqlite:///", "postgresql+psycopg://", "postgresql://", "postgres://")):
        raise ValueError("use sqlite:////path/to/jobs.sqlite or postgresql://user:password@host/database")


def _keys(parts: tuple[str, ...]) -> None:
    if not all(part.partition("=")[2] for part in parts):
        raise ValueError("use NAME=KEY, several with commas between them; NAME is the owner")


@dataclass(frozen=True)
class WorkSettings:
    data: Path | None = setting(None, path, "folder of this box: jobs, files, secrets, downloads")
    database: str | None = setting(
        None, checked(str, _database), "job store; without it SQLite in the data folder", is_secret=True
    )
    files: Path | None = setting(
        None, path, "folder of files, which boxes may share; default: files in the data folder"
    )
    api_keys: tuple[str, ...] = setting(
        (), checked(names, _keys), "NAME=KEY, comma-separated: let in from the start", is_secret=True
    )
    workers: int | None = setting(None, count, "workers of this box; without it one a GPU, or one on the CPU")
    preview_interval: int = setting(1, positive, "steps between two previews of a stream")
    run_limit_s: float = setting(3600.0, seconds, "a run that takes longer fails with generation_timeout")
    max_queue_length: int = setting(10_000, positive, "jobs that may wait")
    max_queued_per_key: int | None = setting(None, positive, "jobs of one owner that may wait; without it any number")
    max_overtaken: int = setting(
        15, count, "later jobs whose LoRAs are merged already that may go before one; 0 keeps the order"
    )
    jobs_kept_s: float = setting(7 * _DAY_S, seconds, "how long finished jobs and their results can be asked for")
    sync_results_kept_s: float = setting(600.0, seconds, "how long results with sync_mode can be asked for")
    files_kept_s: float | None = setting(None, seconds, "how long files are kept; without it until they are removed")
    files_quota_mib: int | None = setting(None, positive, "disk for files; without it all there is")
    max_file_mib: int = setting(16384, positive, "largest upload")
    webhook_retry_delays_s: tuple[float, ...] = setting(
        (5.0, 15.0, 40.0, 120.0, 300.0, 600.0, 900.0, 1320.0, 1800.0, 2100.0),
        _numbers,
        "seconds before each further try of a webhook, comma-separated",
    )
    lease_s: float = setting(30.0, seconds, "a worker not heard of for so long has lost its job")
    stage_load_s: float = setting(1800.0, seconds, "without progress for so long, a stage has hung: loading the model")
    stage_warm_up_s: float = setting(1800.0, seconds, "the first edit")
    stage_claim_s: float = setting(120.0, seconds, "asking for a job")
    stage_fetch_s: float = setting(60.0, seconds, "fetching inputs")
    stage_open_s: float = setting(120.0, seconds, "decoding the input image")
    stage_merge_s: float = setting(300.0, seconds, "merging LoRAs")
    stage_compile_s: float = setting(900.0, seconds, "compiling")
    stage_step_s: float = setting(300.0, seconds, "one denoise step")
    stage_decode_s: float = setting(300.0, seconds, "decoding and the safety checkers")
    stage_save_s: float = setting(120.0, seconds, "saving results")
    stage_finish_s: float = setting(120.0, seconds, "recording the end")
    worker_silence_s: float = setting(60.0, seconds, "a worker process that says nothing for so long is ended")
    log_json: bool = setting(False, flag, "1 logs lines of JSON")

    @property
    def data_folder(self) -> Path:
        """The user's own where none is set, by the XDG base directory specification."""
        if self.data is not None:
            return self.data.absolute()
        base = os.environ.get("XDG_DATA_HOME", "")
        return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "share") / "kontextd"

    @property
    def files_folder(self) -> Path:
        return (self.files or self.data_folder / "files").absolute()

    def store_policy(self) -> Policy:
        from kontextd_server.store import Policy

        return Policy(
            lease_s=self.lease_s,
            affinity_window=self.max_overtaken + 1,
            max_queue_length=self.max_queue_length,
            max_queued_per_owner=self.max_queued_per_key,
            transient_result_s=self.sync_results_kept_s,
            finished_jobs_s=self.jobs_kept_s,
        )

    def folder_limits(self) -> FolderLimits:
        from kontextd_server.files import FolderLimits

        limits = FolderLimits(
            quota_bytes=None if self.files_quota_mib is None else self.files_quota_mib * MIB,
            max_file_bytes=self.max_file_mib * MIB,
        )
        if self.files_kept_s is None:
            return limits
        return FolderLimits(limits.quota_bytes, limits.max_file_bytes, self.files_kept_s, self.files_kept_s)

    def worker_policy(self, drain_s: float) -> WorkerPolicy:
        from kontextd_server.worker import StageDeadlines, WorkerPolicy

        deadlines = {field.name: getattr(self, f"stage_{field.name}") for field in fields(StageDeadlines)}
        return WorkerPolicy(
            deadlines=StageDeadlines(**deadlines),
            run_limit_s=self.run_limit_s,
            preview_interval=self.preview_interval,
            drain_s=drain_s,
        )

    def supervisor_policy(self, drain_s: float) -> SupervisorPolicy:
        """Its patience at the end goes beyond the worker's own."""
        from kontextd_server.worker import SupervisorPolicy

        return SupervisorPolicy(stop_s=self.worker_policy(drain_s).stop_s + 14.0)

    def delivery_policy(self, with_report: bool) -> DeliveryPolicy:
        from kontextd_server.worker import DeliveryPolicy

        return DeliveryPolicy(retry_delays_s=self.webhook_retry_delays_s, with_report=with_report)
