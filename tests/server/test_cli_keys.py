"""`kontextd keys` as an operator meets it: real stores, and what goes to which stream."""

from __future__ import annotations

import io
import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from kontextd_server.cli import main
from kontextd_server.store import ApiKey, Scope, migrate, open_store, sqlite_url

Keys = Callable[..., int]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "template.sqlite"
    migrate(sqlite_url(path))
    return path


@pytest.fixture
def data(tmp_path: Path, template: Path) -> Path:
    """A data folder with an empty store."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(template, folder / "jobs.sqlite")
    return folder


@pytest.fixture
def keys(data: Path) -> Keys:
    return lambda action, *arguments: main(["keys", action, "--data", str(data), *arguments])


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets stdin hold a text."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def found(data: Path, plain: str) -> ApiKey | None:
    store = open_store(sqlite_url(data / "jobs.sqlite"))
    try:
        return store.keys.find(plain)
    finally:
        store.close()


def all_keys(data: Path) -> tuple[ApiKey, ...]:
    store = open_store(sqlite_url(data / "jobs.sqlite"))
    try:
        return store.keys.all()
    finally:
        store.close()


def test_create_prints_the_key_alone_on_stdout(data: Path, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys("create", "--name", "studio") == 0
    shown = capsys.readouterr()
    (plain,) = shown.out.splitlines()
    key = found(data, plain)
    assert key is not None
    assert (key.name, key.scopes) == ("studio", {Scope.INFER})
    assert shown.err == f"key {key.id} of 'studio'; it is not shown again\n"


def test_create_makes_the_store_where_there_is_none_for_its_owner_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "new"
    assert main(["keys", "create", "--data", str(data), "--name", "studio"]) == 0
    assert found(data, capsys.readouterr().out.strip()) is not None
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    assert stat.S_IMODE((data / "jobs.sqlite").stat().st_mode) == 0o600


def test_create_tells_scripts_all_there_is(data: Path, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys("create", "--name", "ops", "--scope", "admin", "--json") == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    key = found(data, told["key"])
    assert key is not None
    assert (told["id"], told["name"], told["scopes"], told["revoked_at"]) == (key.id, "ops", ["admin"], None)
    assert shown.err == ""


def test_list_shows_every_key_and_no_secret(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    plains = []
    for name in ("anna", "bert"):
        keys("create", "--name", name)
        plains.append(capsys.readouterr().out.strip())
    first_id = plains[0].partition(":")[0]
    assert keys("revoke", first_id) == 0
    assert keys("list") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(first_id)
    assert " anna " in first
    assert " revoked 20" in first
    assert second.endswith("active")
    assert keys("list", "--json") == 0
    told = capsys.readouterr().out
    assert [key["name"] for key in json.loads(told)] == ["anna", "bert"]
    assert json.loads(told)[0]["revoked_at"].endswith("+00:00")
    for plain in plains:
        assert plain.partition(":")[2] not in told + first + second


def test_import_lets_an_existing_key_in(
    data: Path, keys: Keys, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed("id:an-old-secret-of-fal\n")
    assert keys("import", "--name", "studio", "--scope", "admin") == 0
    assert "an-old-secret" not in capsys.readouterr().out
    key = found(data, "id:an-old-secret-of-fal")
    assert key is not None
    assert (key.name, key.scopes) == ("studio", {Scope.ADMIN})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it has 0 characters"),
        ("topsecret\n", "A key is 16 to 1024 characters"),
        ("topsecret with spaces\n", "without a space"),
        ("topsecret-für-alle-da\n", "of ASCII"),
    ],
)
def test_what_is_no_key_is_not_imported_and_not_shown(
    data: Path, keys: Keys, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    typed(text)
    assert keys("import", "--name", "studio") == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert "topsecret" not in shown.err
    assert (shown.out, all_keys(data)) == ("", ())


def test_a_key_that_is_known_is_not_imported_again(
    data: Path, keys: Keys, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed("id:an-old-secret-of-fal")
    assert keys("import", "--name", "anna") == 0
    (key,) = all_keys(data)
    typed("id:an-old-secret-of-fal")
    assert keys("import", "--name", "bert", "--scope", "admin") == 2
    assert f"known already as {key.id} of 'anna': it is let in" in capsys.readouterr().err
    assert keys("revoke", key.id) == 0
    typed("id:an-old-secret-of-fal")
    assert keys("import", "--name", "anna") == 2
    assert "it is revoked" in capsys.readouterr().err
    assert [(kept.name, kept.scopes) for kept in all_keys(data)] == [("anna", {Scope.INFER})]


def test_rotate_gives_a_new_key_of_the_same_owner_and_ends_the_old_one(
    data: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    keys("create", "--name", "ops", "--scope", "admin")
    old = capsys.readouterr().out.strip()
    assert keys("rotate", old.partition(":")[0]) == 0
    new = capsys.readouterr().out.strip()
    key = found(data, new)
    assert key is not None
    assert (key.name, key.scopes) == ("ops", {Scope.ADMIN})
    assert found(data, old) is None


def test_revoke_ends_a_key(data: Path, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    keys("create", "--name", "studio")
    plain = capsys.readouterr().out.strip()
    key_id = plain.partition(":")[0]
    assert keys("revoke", key_id, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"id": key_id, "status": "revoked"}
    assert found(data, plain) is None
    for action in ("revoke", "rotate"):
        assert keys(action, key_id) == 2
        assert f"there is no key '{key_id}' that is let in; see kontextd keys list." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "x" * 101, "two\nlines", "bell\a"])
def test_a_name_that_would_break_lists_is_refused(
    data: Path, keys: Keys, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert keys("create", "--name", name) == 2
    assert "use 1 to 100 printable characters." in capsys.readouterr().err
    assert all_keys(data) == ()


@pytest.mark.parametrize("action", [["list"], ["revoke", "x"], ["rotate", "x"]])
def test_where_there_is_no_store_none_is_made_by_looking(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: list[str]
) -> None:
    data = tmp_path / "mistyped"
    assert main(["keys", *action, "--data", str(data)]) == 2
    assert f"there is no job store at {data / 'jobs.sqlite'}: check --data or --database." in capsys.readouterr().err
    assert not data.exists()


def test_a_database_that_does_not_answer_is_no_bug_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path}/nowhere/jobs.sqlite"
    assert main(["keys", "create", "--data", str(tmp_path), "--database", url, "--name", "x"]) == 1
    told = capsys.readouterr().err
    assert "the job store does not answer" in told
    assert "--database or KONTEXTD_DATABASE" in told
    assert "bug" not in told


def test_tables_of_another_version_are_refused_with_the_remedy(
    data: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = sa.create_engine(sqlite_url(data / "jobs.sqlite"))
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    for action in (["list"], ["create", "--name", "x"]):
        assert keys(*action) == 2
        told = capsys.readouterr().err
        assert "upgrade kontextd" in told
        assert "bug" not in told
