"""One job through the engine: inputs, steps, result. Knows the order; keeps nothing and ends no job.

Between two steps, and all the time while inputs are fetched, it looks whether to go on: whether the job is still ours,
was cancelled, has run for too long, or is to be handed back.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from kontextd_models import Done, EditRequest, Step

from kontextd_server.store import JobKind, LogLine, Standing
from kontextd_server.wire.errors import GenerationTimeout
from kontextd_server.wire.schema import FluxKontextLoraInput, LoraReport
from kontextd_server.worker.held import HeldJob, News, log_line
from kontextd_server.worker.inputs import GatheredLoras, Inputs, gather
from kontextd_server.worker.loaded import LoadedEngine
from kontextd_server.worker.lora_reports import coverage_lines, wire_reports
from kontextd_server.worker.policy import WorkerPolicy
from kontextd_server.worker.requests import edit_request, parse_input
from kontextd_server.worker.stages import Stage
from kontextd_server.worker.stopping import Stopping

log = logging.getLogger(__name__)


class Why(Enum):
    """Why a job is given up half-way, by nobody's fault."""

    CANCELLED = "cancelled"
    LOST = "lost"  # another worker has it, or nobody is to have it
    HANDED_BACK = "handed back"


class GivenUp(Exception):
    """Ends the work on a job wherever it is."""

    def __init__(self, why: Why) -> None:
        super().__init__(why.value)
        self.why = why


@dataclass(frozen=True)
class Edited:
    """What the engine made of a job."""

    wanted: FluxKontextLoraInput  # but for its image and LoRAs
    done: Done
    fetch_s: float
    loras: tuple[LoraReport, ...] = ()
    lora_load_s: float | None = None  # None without any


class JobEdit:
    """The work on one job, in the thread of the engine."""

    def __init__(self, held: HeldJob, loaded: LoadedEngine, policy: WorkerPolicy, stopping: Stopping) -> None:
        self._held, self._loaded, self._policy, self._stopping = held, loaded, policy, stopping
        self._told_at = time.monotonic()  # the store has just given us the job
        self._deadline = self._told_at + policy.run_limit_s
        self.has_merged = False  # its LoRA set is the one that is merged now

    def run(self, payload: bytes, inputs: Inputs, folder: Path) -> Edited:
        """Raises `GivenUp`, `InputFailed`, `GenerationTimeout`, `Invalid`, and what the engine raises."""
        began = time.monotonic()
        wanted = parse_input(payload)
        gathered = gather(inputs, wanted, folder, self._loaded.intake, self._held.watch, self._look)
        self._look()
        # An input in the body may have a hundred megabytes, and results wait to be saved.
        wanted, fetch_s = wanted.model_copy(update={"image_url": ""}), time.monotonic() - began
        is_watched = self._held.claim.kind is JobKind.STREAM
        request = edit_request(wanted, gathered, self._policy.preview_interval if is_watched else 0)
        done = self._drive(request, gathered.loras)
        self._held.tell(News(self._told(done)))
        reports = wire_reports(wanted.loras, done)
        load_s = gathered.loras.fetch_s if request.loras else None
        return Edited(wanted.model_copy(update={"loras": []}), done, fetch_s, reports, load_s)

    def _drive(self, request: EditRequest, loras: GatheredLoras) -> Done:
        """Run the engine to its end. Whatever is raised here closes its iterator, which stops it within a step."""
        more_s = self._policy.deadlines.more_merge_s(len(loras.weights), loras.size_bytes)
        self._held.watch.enter(Stage.PREPARE, more_s=more_s)
        with closing(self._loaded.engine.edit(request)) as events:
            for event in events:
                if isinstance(event, Done):
                    return event
                self.has_merged = True
                self._held.watch.enter(_after(event, request))
                self._tell(event)
                self._look()
        raise AssertionError("the engine ended without Done")

    def _tell(self, step: Step) -> None:
        news, now = News.of_step(step), time.monotonic()
        if now - self._told_at < self._policy.report_every_s:
            self._held.tell(news)
            return
        self._told_at = now
        self._held.report(news)

    def _look(self) -> None:
        standing = self._held.standing
        if standing is Standing.LOST:
            raise GivenUp(Why.LOST)
        if standing is Standing.CANCEL_REQUESTED:
            raise GivenUp(Why.CANCELLED)
        if self._stopping.hand_back.is_set():
            raise GivenUp(Why.HANDED_BACK)
        if time.monotonic() > self._deadline:
            raise GenerationTimeout(
                f"the request ran for longer than the {self._policy.run_limit_s:g} s allowed. Ask for fewer steps."
            )

    def _told(self, done: Done) -> tuple[LogLine, ...]:
        """The engine's warnings may quote the request, of which a transient job leaves no trace."""
        transient = self._held.claim.transient
        warnings = [done.size.reason, *(() if transient else done.warnings)]
        coverage = list(coverage_lines(done, transient=transient))
        for line in coverage:
            log.info("request %s: %s", self._held.claim.request_id, line)
        return tuple(log_line(text, "WARN") for text in warnings if text) + tuple(
            log_line(text, "INFO") for text in coverage
        )


def _after(step: Step, request: EditRequest) -> Stage:
    return Stage.STEP if step.index % request.num_inference_steps else Stage.DECODE
