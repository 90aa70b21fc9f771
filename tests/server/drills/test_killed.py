"""kill -9 of a worker and of the API under a supervisor, and a job that kills workers: nothing is lost or doubled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import fal_clients
from kontextd_server.store import JobFilter, JobKind, Outcome

from .box import Box
from .calls import ENDPOINT, Caller, detail, picture_uri
from .processes import WAIT_S, until
from .receiver import Receiver

CLIENTS = 50
POLL_S = 0.2


def test_a_job_whose_worker_is_killed_runs_again_and_is_told_once(
    supervised_box: Box, gate: Path, new_receiver: Callable[..., Receiver]
) -> None:
    box, anna, receiver = supervised_box, supervised_box.caller(), new_receiver()
    request_id = anna.submit(f"hold {gate}", webhook=receiver.url, seed=11)
    first = box.in_step(request_id)
    os.kill(box.pid_of_worker(first.worker), signal.SIGKILL)
    second = box.in_step(request_id, attempt=2)
    assert second.worker != first.worker
    gate.touch()
    anna.made(anna.completed(request_id))
    assert box.pictures_of(11) == 1
    assert "worker was lost" in str(anna.status(request_id)["logs"])
    until(lambda: box.store.views.gauges().webhooks_pending == 0, "the webhook")
    assert receiver.successes(request_id) == len(receiver.heard) == 1
    assert (receiver.heard[0].body["status"], receiver.heard[0].body["payload"]["seed"]) == ("OK", 11)


@dataclass
class Poller:
    """A client that polls its job to the end, as often as connections break; but none may be refused."""

    caller: Caller
    request_id: str
    polls: int = 0
    breaks: list[str] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)

    def run(self) -> str:
        """Returns the status at the end."""
        connection = HTTPConnection(urlsplit(self.caller.url).netloc, timeout=WAIT_S)
        while not self.gone.wait(POLL_S):
            try:
                connection.request("GET", self._path, headers={"Authorization": f"Key {self.caller.key}"})
                answer = json.load(connection.getresponse())
            except ConnectionRefusedError:
                raise
            except (OSError, HTTPException) as error:
                self.breaks.append(repr(error))
                connection.close()
                continue
            self.polls += 1
            if answer["status"] == "COMPLETED":
                connection.close()
                return str(answer.get("error_type", "OK"))
        return "stopped"

    @property
    def _path(self) -> str:
        return f"/queue/{ENDPOINT}/requests/{self.request_id}/status"


def later(poller: Poller, polls: int) -> bool:
    return poller.polls > polls


def test_clients_get_over_the_killing_of_the_api_and_lose_nothing(supervised_box: Box, gate: Path) -> None:
    box, anna = supervised_box, supervised_box.caller()
    prompts = [f"hold {gate}"] * 2 + ["nothing"] * (CLIENTS - 2)  # the two that run keep the others in the queue
    pollers = [Poller(anna, anna.submit(prompt)) for prompt in prompts]
    with ThreadPoolExecutor(CLIENTS) as threads:
        ends = [threads.submit(poller.run) for poller in pollers]
        try:
            until(lambda: all(poller.polls for poller in pollers), "all to poll")
            assert not any(end.done() for end in ends)
            os.kill(box.runs[0].pids("api")[-1], signal.SIGKILL)
            polls = [poller.polls for poller in pollers]
            until(lambda: any(end.done() for end in ends) or all(map(later, pollers, polls)), "recovery")
            gate.touch()
            assert {end.result(WAIT_S) for end in ends} == {"OK"}
        finally:
            for poller in pollers:
                poller.gone.set()
    assert any(poller.breaks for poller in pollers)  # they did meet the end of the process
    assert len(box.runs[0].pids("api")) >= 2
    for poller in pollers:
        anna.made(anna.result(poller.request_id))
        assert box.job(poller.request_id).attempt == 1


RUN = """
const [, , proxyUrl, key, image_url, prompt] = process.argv;
const { fal } = require("@fal-ai/client");
fal.config({ credentials: key, proxyUrl: { url: proxyUrl, when: "always" } });
fal.run("fal-ai/flux-kontext-lora", { input: { image_url, prompt } }).then(
  () => console.log("{}"),
  (error) => console.log(JSON.stringify({ status: error.status, body: error.body })));
"""


def test_a_job_that_kills_its_workers_fails_for_good_while_others_run(
    supervised_box: Box, gate: Path, tmp_path: Path
) -> None:
    box, anna, bert = supervised_box, supervised_box.caller(), supervised_box.caller("bert")
    script = tmp_path / "run.cjs"
    script.write_text(RUN)
    command = ["node", str(script), f"{box.url}/api/fal/proxy", bert.key, picture_uri(), f"die {gate}"]
    environment = {"PATH": os.environ["PATH"], "NODE_PATH": str(fal_clients.js_modules())}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as node:
        try:
            (poison,) = until(lambda: box.store.views.jobs(JobFilter(owner="bert")), "the poison")
            box.in_step(poison.request_id)
            anna.made(anna.completed(anna.submit()))  # by the other worker
            gate.touch()
            told = json.loads(node.communicate(timeout=WAIT_S)[0])
        finally:
            node.kill()
    assert (told["status"], told["body"]["error_type"]) == (500, "runner_disconnected")
    (poison,) = box.store.views.jobs(JobFilter(owner="bert"))  # the client did not post it again
    assert (poison.kind, poison.outcome, poison.attempt) == (JobKind.RUN, Outcome.FAILED, 3)
    assert detail(bert.result(poison.request_id)) == (500, "runner_disconnected")
    anna.made(anna.completed(anna.submit()))
