"""Lines of JSON: what of a record stands in them, and that each process can write them by itself."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from kontextd_server.json_log import JsonLines


def record_of(text: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("kontextd", logging.INFO, "f", 1, text, arguments, None)


def test_a_line_of_the_log_is_json_with_the_request_id() -> None:
    record = record_of("%s done", "it")
    record.request_id = "r1"
    told = json.loads(JsonLines().format(record))
    assert (told["message"], told["request_id"], told["level"]) == ("it done", "r1", "INFO")


def test_an_exception_stands_in_its_line() -> None:
    record = record_of("failed")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        record.exc_info = sys.exc_info()
    (line,) = JsonLines().format(record).splitlines()
    assert json.loads(line)["traceback"].endswith("ValueError: first\nsecond")


WORKER = """
import sys
from kontextd_server.cli import main
code = main(["worker", "--data", sys.argv[1]])
print(code, sorted(name for name in sys.modules if name.startswith("kontextd_server.api")))
"""


def test_a_worker_that_logs_json_loads_no_api(tmp_path: Path) -> None:
    environment = {**os.environ, "KONTEXTD_LOG_JSON": "1"}
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.stdout == "2 []\n", ran.stderr  # there is no job store to join
