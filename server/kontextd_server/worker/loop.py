"""The loop of a worker: claim a job, edit, hand the ending on. One thread, the only one that ever uses the engine."""

from __future__ import annotations

import logging
from dataclasses import replace

from kontextd_server.store import CANCELLED, Claim, Store, StoreUnavailable, Subscription, WorkerState
from kontextd_server.worker.edit import GivenUp, JobEdit, Why
from kontextd_server.worker.failures import is_expected
from kontextd_server.worker.held import HeldJob
from kontextd_server.worker.inputs import Inputs
from kontextd_server.worker.keeper import LeaseKeeper
from kontextd_server.worker.loaded import LoadedEngine, warm_up
from kontextd_server.worker.policy import WorkerPolicy
from kontextd_server.worker.presence import Presence
from kontextd_server.worker.saver import HandBack, Saver
from kontextd_server.worker.scratch import Scratch
from kontextd_server.worker.stages import Stage, StageWatch
from kontextd_server.worker.stopping import Stopping

log = logging.getLogger(__name__)


class EngineBroken(Exception):
    """An edit failed in a way that nobody foresaw, and afterwards the engine cannot make even its short one."""


class WorkerLoop:
    """Runs jobs until it is to stop."""

    def __init__(
        self,
        store: Store,
        inputs: Inputs,
        scratch: Scratch,
        keeper: LeaseKeeper,
        saver: Saver,
        presence: Presence,
        stopping: Stopping,
        policy: WorkerPolicy,
    ) -> None:
        self._store, self._inputs, self._scratch = store, inputs, scratch
        self._keeper, self._saver, self._presence = keeper, saver, presence
        self._stopping, self._policy = stopping, policy
        self._lora_key = ""  # the base model is a set too
        self._hint: str | None = None
        self._failed_claims = 0

    def run(self, loaded: LoadedEngine, jobs: Subscription, watch: StageWatch) -> None:
        """`jobs` wakes it. Raises `EngineBroken`."""
        while not self._stopping.no_more_jobs.is_set():
            watch.enter(Stage.CLAIM)
            claim = self._claimed()
            watch.enter(Stage.IDLE)  # a job has a watch of its own
            if claim is None:
                jobs.wait(self._pause_s())
                continue
            self._presence.say(state=WorkerState.BUSY, lora_key=self._lora_key)
            self._run(claim, loaded, watch)
            self._presence.say(state=WorkerState.READY, lora_key=self._lora_key)

    def _claimed(self) -> Claim | None:
        try:
            claim = self._store.leases.claim(
                self._presence.worker.id, warm_lora_key=self._lora_key, runner_hint=self._hint
            )
        except StoreUnavailable as error:
            self._failed_claims += 1
            if self._failed_claims == 1:
                log.warning("no job can be claimed, which is tried again: %s", error)
            return None
        self._failed_claims = 0
        return claim

    def _pause_s(self) -> float:
        return self._policy.retry.delay_s(self._failed_claims) if self._failed_claims else self._policy.poll_s

    def _run(self, claim: Claim, loaded: LoadedEngine, watch: StageWatch) -> None:
        """One job, whose ending goes to the saver, whatever becomes of it."""
        log.info("request %s: attempt %d begins", claim.request_id, claim.lease.attempt)
        held = self._keeper.hold(replace(claim, payload=b""))  # which may be large, and is read here alone
        edit = JobEdit(held, loaded, self._policy, self._stopping)
        try:
            with self._scratch.job() as folder:
                edited = edit.run(claim.payload, self._inputs, folder)
        except GivenUp as given_up:
            self._give_up(held, given_up.why)
        except Exception as error:
            if not is_expected(error):
                self._check_engine(loaded, watch, error)
            self._saver.fail(held, error)
        else:
            self._saver.put(held, edited)
        self._presence.describe(device=loaded.told_device, model_version=loaded.version)  # a fallback is new, perhaps
        if edit.has_merged:
            self._lora_key, self._hint = claim.lora_key, claim.runner_hint

    def _give_up(self, held: HeldJob, why: Why) -> None:
        log.info("request %s is given up: %s", held.claim.request_id, why.value)
        if why is Why.LOST:
            self._keeper.drop(held)
        elif why is Why.CANCELLED:
            self._saver.put(held, CANCELLED)
        else:
            self._saver.put(held, HandBack())

    def _check_engine(self, loaded: LoadedEngine, watch: StageWatch, error: Exception) -> None:
        """After what nobody foresaw: a device in a bad state fails every later edit as well.

        Then the job is not failed: this process ends, and another worker runs it, at most as often as jobs are run.
        """
        log.error("an edit failed in a way that nobody foresaw; checking the engine", exc_info=error)
        watch.enter(Stage.WARM_UP)
        try:
            warm_up(loaded)
        except Exception as failure:
            raise EngineBroken("the engine cannot make an edit any more; this worker must start anew") from failure
        watch.enter(Stage.IDLE)
