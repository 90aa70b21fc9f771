"""Of pictures that came as data URIs no byte stays. Last of its folder: by now most of the waiting is over."""

from __future__ import annotations

import httpx

from .box import ENDPOINT, LiveBox, eventually
from .inline import Inline, secrets_of, traces

KEPT_AND_PRUNED_S = 30 + 60  # the setting of this box, and how often a box looks


def test_the_search_finds_a_result_as_long_as_it_is_kept(inline: Inline) -> None:
    assert [path for path in inline.found_at_first if path.startswith("jobs.sqlite")]


def test_no_byte_stays_in_database_log_or_data_folder(inline: Inline, box: LiveBox) -> None:
    uris = secrets_of(inline)
    eventually(lambda: not traces(box.data, uris), within_s=KEPT_AND_PRUNED_S + 120, every_s=2)
    assert {"jobs.sqlite", "files"} <= {path.name for path in box.data.iterdir()}


def test_a_result_that_is_gone_says_so_and_its_request_stays_completed(inline: Inline, box: LiveBox) -> None:
    requests = f"{box.url}/queue/{ENDPOINT}/requests"
    with httpx.Client(headers={"Authorization": f"Key {box.keys.own}"}, trust_env=False, timeout=60) as client:
        for name in ("subscribed", "queued"):
            request = f"{requests}/{inline.told[name]['requestId']}"
            eventually(lambda request=request: client.get(request).status_code == 404, within_s=KEPT_AND_PRUNED_S)
            assert "removed" in client.get(request).json()["detail"]
            assert client.get(f"{request}/status").json()["status"] == "COMPLETED"
