"""By TLS and name resolution alone, at port 443: clients that are told of a CA and a key, and of nothing else."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import fal_clients
import pytest

from .box import LiveBox
from .conftest import ELSEWHERE, FAL_NAMES, Named
from .expected import check_output, check_stream, edit_of, endless
from .javascript import LARGE, check_every_call
from .python import EVERY_CALL, check_calls, check_uploads
from .studio import Studio

FILES, QUEUE = "https://v3.fal.media/files/", "https://queue.fal.run/"
MORE_THAN_100_MB = 100 * 2**20 + 4321

WITHOUT_THE_FIRST_NAMES = """
import asyncio, json, sys, fal_client
edit, ENDPOINT, names, addresses = json.loads(sys.argv[1]), "fal-ai/flux-kontext-lora", set(), set()

def watch(event, arguments):
    if event == "socket.getaddrinfo":
        names.add(arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0])
    if event == "socket.connect":
        addresses.add(arguments[1][0])

sys.addaudithook(watch)

async def asynchronously():
    handle = await fal_client.submit_async(ENDPOINT, edit)
    streamed = [event async for event in fal_client.stream_async(ENDPOINT, edit)]
    return {"ran": await fal_client.run_async(ENDPOINT, edit), "got": await handle.get(), "streamed": streamed}

def blocking():
    handle = fal_client.submit(ENDPOINT, edit)
    streamed = list(fal_client.stream(ENDPOINT, edit))
    return {"ran": fal_client.run(ENDPOINT, edit), "got": handle.get(), "streamed": streamed}

told = [blocking(), asyncio.run(asynchronously())]
print(json.dumps({"told": told, "names": sorted(names), "addresses": sorted(addresses)}))
"""


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory, photo_file: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("uploads")
    (folder / "photo.png").write_bytes(photo_file.read_bytes())
    (folder / "big.bin").write_bytes(secrets.token_bytes(MORE_THAN_100_MB))
    yield folder
    (folder / "big.bin").unlink()


@pytest.mark.parametrize("is_async", [False, True], ids=["blocking", "async"])
def test_python_makes_every_call_unchanged(
    is_async: bool, named: Named, box: LiveBox, studio: Studio, uploads: Path
) -> None:
    asked = {"async": is_async, "input": edit_of(studio), "endless": endless(studio), "uploads": str(uploads)}
    told = fal_clients.run_python(
        EVERY_CALL.read_text(), named.environment, json.dumps(asked), inside=named.inside(), timeout_s=300
    )
    check_calls(told, box, files=FILES, queue=QUEUE)
    check_uploads(told["uploaded"], hashlib.sha256((uploads / "big.bin").read_bytes()).hexdigest(), FILES)


def test_javascript_makes_the_calls_of_fals_page_unchanged(named: Named, studio: Studio, js: Path) -> None:
    asked = json.dumps({"config": None, "input": edit_of(studio), "webhookUrl": None})
    told = fal_clients.run_js(
        "fal_page.cjs", asked, environment=named.environment, inside=named.inside(), timeout_s=300
    )
    for output in (told["subscribed"]["data"], told["streamed"]["result"], told["queued"]["data"]):
        check_output(output, FILES)
    check_stream(told["streamed"]["events"], FILES)
    assert told["uploaded"]["url"].startswith(FILES)
    assert told["uploaded"]["text"] == "Hello, World!"


def test_javascript_makes_every_other_call_unchanged(
    named: Named, box: LiveBox, studio: Studio, js: Path, photo_file: Path
) -> None:
    inputs = {"input": edit_of(studio), "endless": endless(studio), "photo": str(photo_file)}
    told = fal_clients.run_js(
        "every_call.cjs",
        json.dumps({"config": None, "bytes": LARGE, **inputs}),
        environment=named.environment,
        inside=named.inside(),
        timeout_s=300,
    )
    check_every_call(told, box, FILES)
    check_output(told["direct"], FILES)


def test_a_client_whose_first_names_do_not_answer_reaches_us_and_nobody_else(named: Named, studio: Studio) -> None:
    """fal-client then sends key and input to other names, which therefore have to lead here too."""
    away = ("fal.run", "queue.fal.run")
    told = fal_clients.run_python(
        WITHOUT_THE_FIRST_NAMES,
        named.environment,
        json.dumps(edit_of(studio)),
        inside=named.inside(away),
        timeout_s=300,
    )
    for face in told["told"]:
        check_output(face["ran"], FILES)
        check_output(face["got"], FILES)
        check_stream(face["streamed"], FILES)
    assert set(told["names"]) == {*away, "falrun.com", "queue.falrun.com"}
    assert set(told["names"]) <= set(FAL_NAMES)
    assert set(told["addresses"]) == {"127.0.0.1", ELSEWHERE}
