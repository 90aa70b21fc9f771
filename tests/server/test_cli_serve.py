"""What `kontextd serve` and `worker` are put together from: devices, children, keys, socket, certificate, welcome."""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.hazmat.primitives.serialization import load_pem_private_key as load_key
from kontextd_server import cli_serve, welcome
from kontextd_server.certs import CertificateFiles, issue, make_authority, write_certificates
from kontextd_server.cli import main
from kontextd_server.files import FolderStore
from kontextd_server.listening import check_certificate, check_lending, listening_socket
from kontextd_server.settings import SettingError, Settings
from kontextd_server.store import Store, migrate, open_store, sqlite_url
from kontextd_server.worker import EXIT_MISTAKE, Companion, Deliverer, Housekeeping, OldFiles, OldJobs

OLD_KEY = "id:an-old-secret-of-fal"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "template.sqlite"
    migrate(sqlite_url(path))
    return path


@pytest.fixture
def store(tmp_path: Path, template: Path) -> Iterator[Store]:
    shutil.copy(template, tmp_path / "jobs.sqlite")
    opened = open_store(sqlite_url(tmp_path / "jobs.sqlite"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    return write_certificates(tmp_path_factory.mktemp("tls of the box"), ["fal.run", "box.lan", "10.20.0.5"])


# Devices.


@pytest.mark.parametrize(
    ("gpus", "settings", "devices"),
    [
        (0, Settings(), ["cpu"]),
        (0, Settings(workers=2), ["cpu", "cpu"]),
        (2, Settings(), ["cuda:0", "cuda:1"]),
        (2, Settings(workers=3), ["cuda:0", "cuda:1", "cuda:0"]),
        (2, Settings(workers=1), ["cuda:0"]),
        (2, Settings(workers=0), []),
        (2, Settings(device="cuda:1"), ["cuda:1"]),
        (2, Settings(device="cpu", workers=2), ["cpu", "cpu"]),
    ],
)
def test_there_is_a_worker_for_each_device_unless_settings_say_otherwise(
    monkeypatch: pytest.MonkeyPatch, gpus: int, settings: Settings, devices: list[str]
) -> None:
    monkeypatch.setattr(cli_serve, "_gpu_count", lambda: gpus)
    assert cli_serve._devices(settings) == devices


def test_without_a_driver_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli_serve, "_GPU_FILES", (tmp_path / "nvidiactl",))
    monkeypatch.setattr(cli_serve, "_COUNT_GPUS", "raise SystemExit('asked')")
    assert cli_serve._gpu_count() == 0


def test_with_a_driver_gpus_are_counted_in_a_process_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = tmp_path / "nvidiactl"
    driver.touch()
    monkeypatch.setattr(cli_serve, "_GPU_FILES", (tmp_path / "none", driver))
    monkeypatch.setattr(cli_serve, "_COUNT_GPUS", "print(3)")
    assert cli_serve._gpu_count() == 3
    monkeypatch.setattr(cli_serve, "_COUNT_GPUS", "raise SystemExit('libcuda is broken')")
    with pytest.raises(SettingError, match=r"torch cannot count the GPUs \(libcuda is broken\); see kontextd doctor\."):
        cli_serve._gpu_count()


@pytest.mark.parametrize("one", [{"proxy_key": "id:secret"}, {"proxy_origins": ("https://app.lan",)}])
def test_a_key_to_lend_and_its_origins_need_each_other(one: dict[str, Any]) -> None:
    check_lending(Settings())
    check_lending(Settings(proxy_key="id:secret", proxy_origins=("https://app.lan",)))
    with pytest.raises(SettingError, match="set both, or neither"):
        check_lending(Settings(**one))


# What runs beside.


def test_each_thing_that_may_take_long_has_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    beside: list[Companion] = []

    def note(_specs: object, companions: Sequence[Companion], *_: object, **__: object) -> int:
        beside.extend(companions)
        return 0

    monkeypatch.setattr("kontextd_server.worker.supervise", note)
    parser = argparse.ArgumentParser()
    cli_serve.add_serve_options(parser)
    settings = Settings(data=tmp_path, host="127.0.0.1", port=0, device="cpu", workers=0)
    assert cli_serve.run_serve(parser.parse_args([]), settings) == 0
    assert {type(one) for one in beside} == {Housekeeping, OldJobs, OldFiles, Deliverer}


# Children.


def test_a_worker_child_has_its_device_and_an_id_that_no_other_box_gives() -> None:
    first, second = cli_serve._worker_children(["cuda:0", "cpu"], silence_s=7.0)
    assert (first.name, second.name) == ("worker-0", "worker-1")
    assert (first.is_worker, first.silence_s, first.final_codes) == (True, 7.0, {EXIT_MISTAKE})
    command = list(first.command("worker-0-1a2b"))
    assert command[1:3] == ["-m", "kontextd_server.cli"]
    assert command[3:] == ["worker", "--worker-id", f"{socket.gethostname()}-worker-0-1a2b", "--device", "cuda:0"]
    assert list(second.command("x"))[-1] == "cpu"


def test_the_api_child_inherits_the_listening_socket() -> None:
    with closing(listening_socket("127.0.0.1", 0)) as listener:
        child = cli_serve._api_child(listener, Settings())
        assert child.descriptors == (listener.fileno(),)
        assert list(child.command("api-1"))[3:] == ["api", "--descriptor", str(listener.fileno())]
        assert (child.is_worker, child.final_codes) == (False, {2})


def test_a_worker_for_a_queue_that_there_is_not_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    assert main(["worker", "--data", str(data)]) == 2
    assert "there is no job store at" in capsys.readouterr().err
    assert not (data / "jobs.sqlite").exists()


# Keys.


def test_keys_of_the_environment_are_let_in_once(store: Store) -> None:
    for _ in range(2):
        cli_serve._take_keys(store, [f"anna={OLD_KEY}", "bert=another=secret=with=signs"])
    anna, bert = store.keys.find(OLD_KEY), store.keys.find("another=secret=with=signs")
    assert anna is not None
    assert bert is not None
    assert (anna.name, bert.name, len(store.keys.all())) == ("anna", "bert", 2)


def test_a_key_of_the_environment_that_is_none_is_named_by_its_owner_and_not_shown(store: Store) -> None:
    with pytest.raises(SettingError, match="KONTEXTD_API_KEYS: the key for 'anna' cannot be taken over") as caught:
        cli_serve._take_keys(store, ["anna=short"])
    assert "short" not in str(caught.value)


def test_a_revoked_key_of_the_environment_stays_revoked_and_is_told(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    key = store.keys.import_key(OLD_KEY, "anna")
    store.keys.revoke(key.id)
    with caplog.at_level(logging.WARNING):
        cli_serve._take_keys(store, [f"anna={OLD_KEY}"])
    assert store.keys.find(OLD_KEY) is None
    assert f"is revoked, as {key.id}, and stays so" in caplog.text
    assert OLD_KEY not in caplog.text


def test_the_first_key_is_made_once_and_kept_for_its_owner_alone(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "new" / "first_key"
    plain = welcome.first_key(store, path)
    assert path.read_text() == f"{plain}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert welcome.first_key(store, path) == plain
    (key,) = store.keys.all()
    assert key.name == "first"


def test_a_first_key_that_is_not_let_in_is_replaced(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "first_key"
    plain = welcome.first_key(store, path)
    store.keys.revoke(plain.partition(":")[0])
    renewed = welcome.first_key(store, path)
    assert renewed != plain
    assert store.keys.find(path.read_text().strip()) is not None
    path.write_text("")
    assert welcome.first_key(store, path) not in (plain, renewed)


def test_a_first_key_that_was_taken_over_is_used(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "first_key"
    path.write_text(OLD_KEY)
    store.keys.import_key(OLD_KEY, "anna")
    assert welcome.first_key(store, path) == OLD_KEY


def test_a_file_that_holds_no_key_is_never_replaced(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("all that I know of keys: keep them\n")
    with pytest.raises(SettingError, match="holds no key of kontextd, so it is not replaced"):
        welcome.first_key(store, path)
    assert path.read_text().startswith("all that I know")
    assert store.keys.all() == ()


# Socket and certificate.


def test_the_socket_listens_before_anybody_accepts() -> None:
    with closing(listening_socket("127.0.0.1", 0)) as listener:
        socket.create_connection(listener.getsockname(), timeout=10).close()


def test_an_address_in_use_is_told_with_the_remedy() -> None:
    with closing(listening_socket("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(SettingError, match=f"127.0.0.1 port {port}: .*Choose others with --host and --port"):
            listening_socket("127.0.0.1", port)


@pytest.mark.parametrize("host", ["203.0.113.7", "a..b", "no such host", f"{'x' * 64}.lan"])
def test_an_address_that_is_not_ours_is_told_with_the_remedy(host: str) -> None:
    with pytest.raises(SettingError, match="Choose others with --host and --port") as caught:
        listening_socket(host, 0)
    assert str(caught.value).startswith(f"cannot listen at {host} port 0: ")


def test_a_certificate_with_its_key_is_good_and_so_is_none(tls: CertificateFiles) -> None:
    check_certificate(tls.leaf, tls.leaf_key)
    check_certificate(None, None)


def test_a_certificate_needs_its_key_beside_it(tls: CertificateFiles) -> None:
    with pytest.raises(SettingError, match="--tls-cert needs --tls-key beside it; kontextd certs makes both"):
        check_certificate(tls.leaf, None)
    with pytest.raises(SettingError, match="--tls-key needs --tls-cert beside it"):
        check_certificate(None, tls.leaf_key)


def test_a_certificate_that_cannot_be_used_is_named(tls: CertificateFiles, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=f"{tmp_path}/gone.pem with the key .* cannot be used: No such file"):
        check_certificate(tmp_path / "gone.pem", tls.leaf_key)
    with pytest.raises(SettingError, match=r"cannot be used: .*KEY_VALUES_MISMATCH"):
        check_certificate(tls.leaf, tls.ca_key)


def test_nobody_is_asked_for_the_passphrase_of_a_key(tls: CertificateFiles, tmp_path: Path) -> None:
    locked = tmp_path / "locked.pem"
    key = load_key(tls.leaf_key.read_bytes(), password=None)
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    with pytest.raises(SettingError, match=r"\[SSL\].*the key one without a passphrase"):
        check_certificate(tls.leaf, locked)


# Welcome.


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        (Settings(), "http://127.0.0.1:{port}"),
        (Settings(host="0.0.0.0"), "http://localhost:{port}"),
        (Settings(host="::"), "http://localhost:{port}"),
        (Settings(host="::1"), "http://[::1]:{port}"),
        (Settings(host="box.lan"), "http://box.lan:{port}"),
        (Settings(public_url="https://kontext.lan/k"), "https://kontext.lan/k"),
    ],
)
def test_the_box_is_reached_where_it_listens(settings: Settings, address: str) -> None:
    with closing(listening_socket("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert welcome.address(settings, listener) == address.format(port=port)


@pytest.mark.parametrize(
    ("names", "host"),
    [
        (["fal.run", "box.lan"], "box.lan"),
        (["fal.run", "*.studio.lan", "box.studio.lan"], "box.studio.lan"),
        (["fal.run", "10.20.0.5"], "10.20.0.5"),
        (["fal.run", "fd00::5"], "[fd00::5]"),
        (["fal.run"], "localhost"),
    ],
)
def test_with_tls_the_box_is_reached_by_a_name_of_its_certificate(tmp_path: Path, names: list[str], host: str) -> None:
    certificate, now = tmp_path / "server.pem", datetime.now(UTC)
    wanted = [x509.IPAddress(ip_address(name)) if name[-1] == "5" else x509.DNSName(name) for name in names]
    _, leaf = issue(make_authority([x509.DNSName("lan")], now), wanted, now)
    certificate.write_bytes(leaf.public_bytes(Encoding.PEM))
    settings = Settings(host="0.0.0.0", tls_cert=certificate)
    with closing(listening_socket("127.0.0.1", 0)) as listener:
        assert welcome.address(settings, listener) == f"https://{host}:{listener.getsockname()[1]}"


def test_at_the_start_it_says_where_all_lies_and_how_long_it_stays(store: Store, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, files_kept_s=90.0, files_quota_mib=512, offline=True)
    database = "postgresql://user:topsecret@db.lan/kontextd"
    told = "\n".join(welcome.at_start(settings, database, "http://box:1", ["cpu"], store))
    assert "listening at http://box:1; workers: cpu" in told
    assert "embedded demonstration model" in told
    assert f"db.lan/kontextd, files in {tmp_path / 'files'}" in told
    assert "topsecret" not in told
    assert "finished jobs are kept 7 days, files 90 s, at most 512 MiB of them" in told
    assert "off-line" in told
    assert "nobody has a key yet" in told


def test_at_the_start_it_says_what_matters_here_and_no_more(store: Store, tmp_path: Path) -> None:
    store.keys.create("anna")
    settings = Settings(data=tmp_path, model=Path("/models/kontext"))
    told = "\n".join(welcome.at_start(settings, "sqlite:////x", "http://box:1", [], store))
    assert "workers: none, they join with kontextd worker" in told
    assert "model /models/kontext" in told
    assert "files until they are removed; KONTEXTD_FILES_KEPT_S sets a time, kontextd files prune" in told
    assert "off-line" not in told
    assert "key" not in told


def test_when_ready_there_is_one_line_to_wait_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    welcome.when_ready("http://box:1", None, FolderStore(tmp_path), Settings())
    assert capsys.readouterr().out == "\nkontextd is ready at http://box:1\n"


def test_with_a_first_key_there_are_lines_to_paste_about_a_photo_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = FolderStore(tmp_path)
    welcome.when_ready("http://box:1", OLD_KEY, files, Settings())
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("#")] == ["# curl", "# JavaScript", "# Python"]
    _, curl, javascript, python = shown.split("\n# ")
    for lines in (curl, javascript, python):
        picture = lines.partition("http://box:1/files/")[2].partition('"')[0]
        assert files.info(picture).content_type == "image/jpeg"
        assert OLD_KEY in lines
        assert "ca.pem" not in lines
        shlex.split(lines.partition("\n")[2])  # its quotes are closed
    assert 'url: "http://box:1/api/fal/proxy", when: "always"' in javascript
    assert 'QUEUE_URL_FORMAT = "http://box:1/queue/"' in python


def test_with_a_ca_of_ours_the_lines_say_whom_to_trust(
    tls: CertificateFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    welcome.when_ready("https://box.lan:1", OLD_KEY, FolderStore(tmp_path), Settings(tls_cert=tls.leaf))
    _, curl, javascript, python = (shlex.split(part) for part in capsys.readouterr().out.split("\n# "))
    assert curl[curl.index("--cacert") + 1] == str(tls.ca)  # a path with spaces
    assert f"NODE_EXTRA_CA_CERTS={tls.ca}" in javascript
    assert {f"SSL_CERT_FILE={tls.ca}", "FAL_RUN_HOST=box.lan:1", "FAL_QUEUE_RUN_HOST=box.lan:1/queue"} <= set(python)
