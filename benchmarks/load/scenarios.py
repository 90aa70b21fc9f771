"""What is done to a server, and what came of it, in milliseconds. Knows fal's calls; starts no server."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from client import Connection
from edits import body
from servers import Server

APP = "/fal-ai/flux-kontext-lora"
Figures = dict[str, float]


def summary(seconds: Iterable[float]) -> Figures:
    sorted_s = sorted(seconds)
    p99 = sorted_s[min(len(sorted_s) - 1, len(sorted_s) * 99 // 100)]
    return {"p50": round(statistics.median(sorted_s) * 1000, 3), "p99": round(p99 * 1000, 3)}


@dataclass(frozen=True)
class Calls:
    """fal's calls on one connection."""

    connection: Connection

    @classmethod
    async def open(cls, server: Server) -> Calls:
        return cls(await Connection.open(server.port, server.headers))

    async def submit(self, asked: bytes) -> str:
        answer = await self.connection.call("POST", f"/queue{APP}", asked)
        assert answer.status == 200, answer
        return str(json.loads(answer.body)["request_id"])

    async def is_completed(self, request_id: str, logs: int = 0) -> bool:
        answer = await self.connection.call("GET", f"/queue{APP}/requests/{request_id}/status?logs={logs}")
        assert answer.status in (200, 202), answer
        return answer.status == 200

    async def result(self, request_id: str) -> None:
        answer = await self.connection.call("GET", f"/queue{APP}/requests/{request_id}")
        assert answer.status == 200, answer

    async def run(self, path: str, asked: bytes) -> None:
        answer = await self.connection.call("POST", path, asked)
        assert answer.status == 200, answer


async def polling(server: Server, pollers: int, every_s: float, for_s: float) -> Figures:
    """Each poller has a waiting request of its own, and asks on its own clock: a late answer delays no other's."""
    first = await Calls.open(server)
    ids = [await first.submit(body(f"waiting {number}")) for number in range(pollers)]
    took: list[float] = []
    late: list[float] = []
    began, cpu_s = time.perf_counter(), server.cpu_s()

    async def poll(number: int) -> None:
        calls, due = await Calls.open(server), time.perf_counter() + every_s * number / pollers
        until = due + for_s
        while due < until:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            sent = time.perf_counter()
            await calls.is_completed(ids[number])
            took.append(time.perf_counter() - sent)
            late.append(sent - due)
            due += every_s
        calls.connection.close()

    await asyncio.gather(*(poll(number) for number in range(pollers)))
    lasted_s = time.perf_counter() - began
    return {
        **summary(took),
        "polls_per_s": round(len(took) / lasted_s, 1),
        "cpu_ms_a_poll": round((server.cpu_s() - cpu_s) / len(took) * 1000, 3),
        "sent_late_p99": summary(late)["p99"],
    }


async def throughput(server: Server, clients: int, every_s: float, for_s: float) -> Figures:
    """Clients that submit, poll until the end, read the result, and begin anew."""
    ended: list[float] = []
    took: list[float] = []
    cpu_s = server.cpu_s()
    began = time.perf_counter()

    async def work(number: int) -> None:
        calls = await Calls.open(server)
        while time.perf_counter() < began + for_s:
            submitted = time.perf_counter()
            request_id = await calls.submit(body(f"client {number}"))
            while not await calls.is_completed(request_id, logs=1):
                await asyncio.sleep(every_s * random.uniform(0.8, 1.2))  # else they fall into step
            await calls.result(request_id)
            ended.append(time.perf_counter())
            took.append(ended[-1] - submitted)
        calls.connection.close()

    await asyncio.gather(*(work(number) for number in range(clients)))
    counted = [at for at in ended if at < began + for_s]
    return {
        **summary(took),
        "jobs_per_s": round(len(counted) / for_s, 1),
        "cpu_ms_a_job": round((server.cpu_s() - cpu_s) / len(ended) * 1000, 3),
    }


async def sync_throughput(server: Server, path: str, clients: int, for_s: float) -> Figures:
    """The same by sync runs, for servers that have nothing else."""
    took: list[float] = []
    began = time.perf_counter()

    async def work(number: int) -> None:
        calls = await Calls.open(server)
        while time.perf_counter() < began + for_s:
            sent = time.perf_counter()
            await calls.run(path, body(f"client {number}"))
            took.append(time.perf_counter() - sent)
        calls.connection.close()

    await asyncio.gather(*(work(number) for number in range(clients)))
    return {**summary(took), "jobs_per_s": round(len(took) / (time.perf_counter() - began), 1)}


async def sync_runs(server: Server, path: str, repeats: int) -> Figures:
    """One after the other, on one connection: from the call to the whole answer."""
    calls, took = await Calls.open(server), []
    for number in range(repeats):
        await asyncio.sleep(random.uniform(0.0, 0.01))  # else each meets the same moment of every loop that polls
        sent = time.perf_counter()
        await calls.run(path, body(f"run {number}"))
        took.append(time.perf_counter() - sent)
    calls.connection.close()
    return summary(took)


async def go(server: Server) -> None:
    """Lets a server begin that waits for it."""
    calls = await Calls.open(server)
    await calls.run("/go", b"{}")
    calls.connection.close()


async def drained(server: Server) -> None:
    """Wait until nothing is left in the queue: whoever comes last is done last."""
    calls = await Calls.open(server)
    request_id = await calls.submit(body("last"))
    while not await calls.is_completed(request_id):
        await asyncio.sleep(0.1)
    calls.connection.close()


async def overhead(server: Server, times: Path, repeats: int) -> Mapping[str, Figures]:
    """One job at a time. Seen by one who polls without a pause, and by one who follows the stream of its status."""
    calls, follower = await Calls.open(server), await Calls.open(server)
    sent: dict[str, float] = {}
    polled: dict[str, float] = {}
    streamed: dict[str, float] = {}
    for number in range(repeats):
        name = f"overhead {number}"
        await asyncio.sleep(random.uniform(0.0, 0.01))
        sent[name] = time.monotonic()
        request_id = await calls.submit(body(name, steps=5, step_s=0.02))
        following = asyncio.ensure_future(_followed(follower, request_id))
        while not await calls.is_completed(request_id):
            pass
        polled[name] = time.monotonic()
        streamed[name] = await following
    for one in (calls, follower):
        one.connection.close()
    lines = [json.loads(line) for line in times.read_text().splitlines()]
    worked = {line["name"]: line for line in lines if line["name"] in sent}
    assert worked.keys() == sent.keys()
    return {
        "submit to the engine's beginning": summary(worked[name]["began"] - sent[name] for name in sent),
        "engine's end to a poller": summary(polled[name] - worked[name]["done"] for name in sent),
        "engine's end to a status stream": summary(streamed[name] - worked[name]["done"] for name in sent),
    }


async def _followed(calls: Calls, request_id: str) -> float:
    """When the status stream told that it is completed."""
    seen_at = 0.0
    async for event in calls.connection.events(f"/queue{APP}/requests/{request_id}/status/stream"):
        if json.loads(event)["status"] == "COMPLETED":
            seen_at = time.monotonic()
    return seen_at
