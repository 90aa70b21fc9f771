"""Uploads by both of fal's protocols, and files as they are read back: whole, in part, and by hostile readers."""

from __future__ import annotations

import errno
import http.client
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from urllib.parse import quote

import httpx
import pytest
from kontextd_server.files import FOR_EVER, Label
from kontextd_server.files.errors import storage_errors

from .conftest import ENDPOINT, Box

DATA = bytes(range(256)) * 5000
HTML = b"<script>alert(1)</script>"


def initiate(box: Box, path: str = "initiate", **headers: str) -> dict[str, str]:
    asked = {"content_type": "text/plain", "file_name": "notes.txt"}
    answer = box.client(**headers).post(f"/rest/storage/upload/{path}?storage_type=fal-cdn-v3", json=asked)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("authorization", ["", "Key whatever"])
def test_a_file_is_put_to_its_upload_url_with_or_without_a_key_and_read_back(box: Box, authorization: str) -> None:
    urls = initiate(box)
    assert "?" not in urls["upload_url"] + urls["file_url"]  # Python's client appends to them
    client = box.client("", **({"Authorization": authorization} if authorization else {}))
    assert client.put(urls["upload_url"], content=DATA).status_code == 200
    read = client.get(urls["file_url"])
    assert (read.content, read.headers["content-type"]) == (DATA, "text/plain")


def test_a_large_file_is_put_in_parts(box: Box) -> None:
    urls, client = initiate(box, "initiate-multipart"), box.client("")
    parts = []
    for number in (2, 1):
        answer = client.put(f"{urls['upload_url']}/{number}", content=DATA[(number - 1) * 640_000 :][:640_000])
        assert answer.headers["etag"] == answer.json()["etag"]
        parts.append(answer.json())
    done = client.post(f"{urls['upload_url']}/complete", json={"parts": parts[::-1]})
    assert done.status_code == 200
    assert client.get(urls["file_url"]).content == DATA


def test_a_grant_is_for_one_file_and_for_one_kind_of_upload(box: Box) -> None:
    whole, parts, client = initiate(box), initiate(box, "initiate-multipart"), box.client("")
    assert client.put(whole["upload_url"], content=b"one").status_code == 200
    assert client.put(whole["upload_url"], content=b"one").status_code == 200  # repeated
    assert client.put(whole["upload_url"], content=b"two").status_code == 400
    assert client.put(whole["upload_url"] + "/1", content=b"x").status_code == 403
    assert client.put(parts["upload_url"], content=b"x").status_code == 403
    assert client.put(whole["upload_url"][:-3] + "abc", content=b"x").status_code == 403


def test_a_grant_expires(idle_box: Box) -> None:
    idle_box.configure(grant_s=0.0)
    idle_box.serve()
    answer = idle_box.client("").put(initiate(idle_box)["upload_url"], content=b"x")
    assert (answer.status_code, answer.headers["x-fal-error-type"]) == (403, "auth_error")


def test_a_token_for_the_files_host_uploads_there_and_nowhere_else(box: Box) -> None:
    told = box.client().post("/rest/storage/auth/token?storage_type=fal-cdn-v3", json={}).json()
    assert told["base_url"] == box.url
    assert told["expires_at"].endswith("+00:00")
    assert datetime.fromisoformat(told["expires_at"]).timestamp() > 0
    client = box.client("", Authorization=f"{told['token_type']} {told['token']}")
    headers = {"Content-Type": "image/png", "X-Fal-File-Name": quote("mein bild.png")}
    url = client.post("/files/upload", content=DATA, headers=headers).json()["access_url"]
    read = client.get(url)
    assert (read.content, read.headers["content-type"]) == (DATA, "image/png")
    assert client.post("/queue/fal-ai/flux-kontext-lora", json={}).status_code == 401
    assert client.post("/rest/storage/auth/token").status_code == 401


def test_a_file_is_uploaded_in_parts_at_the_files_host(box: Box) -> None:
    client = box.client()
    begun = client.post("/files/upload/multipart", headers={"X-Fal-File-Name": "a.bin"}).json()
    base = f"{begun['access_url']}/multipart/{begun['uploadId']}"
    etag = client.put(f"{base}/1", content=DATA).headers["etag"]
    done = client.post(f"{base}/complete", json={"parts": [{"partNumber": 1, "etag": etag}]})
    assert done.json() == {"access_url": begun["access_url"]}
    assert client.get(begun["access_url"]).content == DATA
    wrong = client.post(f"{base}x/complete", json={"parts": [{"partNumber": 1, "etag": etag}]})
    assert wrong.status_code == 404


@pytest.mark.parametrize(
    "path",
    ["/rest/storage/upload/initiate", "/rest/storage/auth/token", "/rest/tokens/", "/files/upload"],
)
def test_uploads_and_tokens_need_a_key(box: Box, path: str) -> None:
    answer = box.client("").post(path, json={"allowed_apps": ["flux-kontext-lora"]})
    assert (answer.status_code, answer.headers["x-fal-error-type"]) == (401, "auth_error")


def answered_amid_the_body(box: Box, method: str, path: str, key: str = "") -> int:
    """The status of a call whose body never ends."""
    connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=60)
    with closing(connection):
        connection.putrequest(method, path)
        if key:
            connection.putheader("Authorization", f"Key {key}")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b'{"allowed_apps": [')
        return connection.getresponse().status


@pytest.mark.parametrize("key", ["", "wrong"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"/{ENDPOINT}"),
        ("POST", f"/{ENDPOINT}/stream"),
        ("POST", f"/queue/{ENDPOINT}"),
        ("PUT", f"/queue/{ENDPOINT}/requests/x/cancel"),
        ("POST", "/rest/storage/upload/initiate"),
        ("POST", "/rest/storage/upload/initiate-multipart"),
        ("POST", "/rest/storage/auth/token"),
        ("POST", "/rest/tokens/"),
        ("POST", "/rest/tokens"),
        ("POST", "/files/upload"),
        ("POST", "/files/upload/multipart"),
        ("PUT", "/files/x/multipart/y/1"),
        ("POST", "/files/x/multipart/y/complete"),
    ],
)
def test_nobodys_body_is_waited_for(box: Box, method: str, path: str, key: str) -> None:
    assert answered_amid_the_body(box, method, path, key) == 401


def test_no_body_is_waited_for_at_a_bad_grant(box: Box) -> None:
    whole, parts = (
        initiate(box, path)["upload_url"].removeprefix(box.url) for path in ("initiate", "initiate-multipart")
    )
    for method, path in (
        ("PUT", whole[:-3] + "abc"),
        ("PUT", whole + "/1"),
        ("PUT", parts),
        ("PUT", parts[:-3] + "abc/1"),
        ("POST", whole + "/complete"),
        ("POST", parts[:-3] + "abc/complete"),
    ):
        assert answered_amid_the_body(box, method, path) == 403, path


@pytest.mark.parametrize("path", ["/rest/tokens/", "/rest/tokens"])
def test_a_token_for_streams_is_a_string_and_is_good_for_its_app(working_box: Box, path: str) -> None:
    token = working_box.client().post(path, json={"allowed_apps": ["flux-kontext-lora"], "token_expiration": 60}).json()
    assert isinstance(token, str)
    url = f"{working_box.url}/fal-ai/flux-kontext-lora"
    body = {"image_url": "x", "prompt": "y"}
    assert httpx.post(f"{url}?fal_jwt_token={token}", json=body, trust_env=False).status_code == 200
    other = working_box.client().post(path, json={"allowed_apps": ["other"]}).json()
    assert httpx.post(f"{url}?fal_jwt_token={other}", json=body, trust_env=False).status_code == 403


def test_a_token_that_would_be_too_long_to_be_taken_is_refused_at_once(box: Box) -> None:
    answer = box.client().post("/rest/tokens/", json={"allowed_apps": [f"{n}{'a' * 100}" for n in range(100)]})
    told = answer.json()["detail"][0]
    assert (answer.status_code, told["loc"]) == (422, ["body", "allowed_apps"])
    assert "Name fewer apps" in told["msg"]


@pytest.mark.parametrize(
    ("asked", "status", "content", "told"),
    [
        ("bytes=0-3", 206, DATA[:4], "bytes 0-3/1280000"),
        ("bytes=-2", 206, DATA[-2:], "bytes 1279998-1279999/1280000"),
        ("bytes=1279999-9999999", 206, DATA[-1:], "bytes 1279999-1279999/1280000"),
        ("lines=1-2", 200, DATA, None),
    ],
)
def test_a_part_of_a_file_is_read_by_its_range(
    box: Box, asked: str, status: int, content: bytes, told: str | None
) -> None:
    key = box.files.put([DATA], Label("a.bin")).key
    answer = box.client("").get(f"/files/{key}", headers={"Range": asked})
    assert (answer.status_code, answer.content) == (status, content)
    assert answer.headers.get("content-range") == told


def test_a_range_behind_the_end_is_416_and_tells_the_size(box: Box) -> None:
    key = box.files.put([b"abc"], Label("a.bin")).key
    answer = box.client("").get(f"/files/{key}", headers={"Range": "bytes=3-"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */3")


def test_a_file_is_read_again_only_if_it_changed_and_by_head_not_at_all(box: Box) -> None:
    key = box.files.put([b"abc"], Label("a.txt", "text/plain")).key
    client = box.client("")
    etag = client.get(f"/files/{key}").headers["etag"]
    assert client.get(f"/files/{key}", headers={"If-None-Match": etag}).status_code == 304
    other = client.get(f"/files/{key}", headers={"If-Range": '"other"', "Range": "bytes=0-0"})
    assert (other.status_code, other.content) == (200, b"abc")
    head = client.head(f"/files/{key}")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "3", b"")


def test_a_served_page_cannot_act_as_one(box: Box) -> None:
    key = box.files.put([HTML], Label('x"\r\n.html', "text/html")).key
    answer = box.client("").get(f"/files/{key}")
    assert answer.content == HTML
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"].startswith("sandbox;")
    assert answer.headers["content-disposition"] == "inline; filename*=UTF-8''x%22%0D%0A.html"


@pytest.mark.parametrize(
    "path",
    [
        "/files/../store.db",
        "/files/..%2fstore.db",
        "/files/%2e%2e/store.db",
        "/files/..%5cstore.db",
        "/files/nothing",
        "/files/",
        "/files/a/b",
    ],
)
def test_what_is_no_key_is_not_found(box: Box, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=20)
    connection.request("GET", path)  # as it stands: other clients put paths in order
    answer = connection.getresponse()
    assert answer.status == 404
    assert answer.headers["x-fal-request-id"]
    answer.read()
    connection.close()


def test_an_upload_that_breaks_off_leaves_nothing_behind(box: Box) -> None:
    urls = initiate(box)
    connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=20)
    connection.putrequest("PUT", urls["upload_url"].removeprefix(box.url))
    connection.putheader("Content-Length", "1000000")
    connection.endheaders(b"x" * 1000)
    connection.close()
    assert box.client("").get(urls["file_url"]).status_code == 404
    assert box.client("").put(urls["upload_url"], content=DATA).status_code == 200
    assert box.files.usage().used_bytes == len(DATA)


def test_a_file_over_the_limit_is_413(idle_box: Box) -> None:
    idle_box.files.limits = replace(idle_box.files.limits, max_file_bytes=1000)
    idle_box.serve()
    answer = idle_box.client().post("/files/upload", content=b"x" * 2000)
    assert (answer.status_code, answer.headers["x-fal-error-type"]) == (413, "file_too_large")


def test_a_full_file_store_is_507_and_names_no_folder(idle_box: Box, caplog: pytest.LogCaptureFixture) -> None:
    def full(label: Label, key: str | None = None) -> None:
        with storage_errors(idle_box.folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    idle_box.files.create = full
    idle_box.serve()
    answer = idle_box.client().post("/files/upload", content=b"x")
    assert (answer.status_code, answer.headers["x-fal-error-type"]) == (507, "internal_error")
    assert "file store is full" in answer.json()["detail"]
    assert str(idle_box.folder) not in answer.text
    assert str(idle_box.folder) in caplog.text


def test_a_full_quota_is_507(idle_box: Box) -> None:
    idle_box.files.blobs.quota_bytes = 1000
    idle_box.serve()
    answer = idle_box.client().post("/files/upload", content=b"x" * 2000)
    assert answer.status_code == 507
    assert "file store is full" in answer.json()["detail"]


def test_of_every_upload_it_is_known_whose_it_is(box: Box) -> None:
    client, by_nobody = box.client(), box.client("")
    whole, parts = initiate(box), initiate(box, "initiate-multipart")
    by_nobody.put(whole["upload_url"], content=b"1")
    etag = by_nobody.put(f"{parts['upload_url']}/1", content=b"2").headers["etag"]
    by_nobody.post(f"{parts['upload_url']}/complete", json={"parts": [{"partNumber": 1, "etag": etag}]})
    at_once = client.post("/files/upload", content=b"3").json()["access_url"]
    begun = client.post("/files/upload/multipart").json()
    base = f"{begun['access_url']}/multipart/{begun['uploadId']}"
    etag = client.put(f"{base}/1", content=b"4").headers["etag"]
    client.post(f"{base}/complete", json={"parts": [{"partNumber": 1, "etag": etag}]})
    urls = (whole["file_url"], parts["file_url"], at_once, begun["access_url"])
    assert [box.files.info(url.rpartition("/")[2]).owner for url in urls] == ["anna"] * 4


def test_a_lifetime_is_kept_with_an_upload(box: Box) -> None:
    wish = '{"expiration_duration_seconds": 3600}'
    for header in ("X-Fal-Object-Lifecycle", "X-Fal-Object-Lifecycle-Preference"):
        urls = initiate(box, **{header: wish})
        box.client("").put(urls["upload_url"], content=b"x")
        file = box.files.info(urls["file_url"].rpartition("/")[2])
        assert file.expires_at == pytest.approx(file.created_at + 3600)
    assert box.files.put([b"x"], Label(lifetime_s=FOR_EVER)).expires_at is None
