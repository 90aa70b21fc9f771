"""Statements on the driver's own cursor: what SQLAlchemy would say and read, on both databases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa
from kontextd_server.store import JobState, Priority, Store
from kontextd_server.store.tables import events, jobs

Submit = Callable[..., str]

WANTED = sa.bindparam("wanted")
ONE = sa.select(jobs).where(jobs.c.request_id == WANTED, jobs.c.state == JobState.IN_QUEUE)
COUNT = sa.select(sa.func.count(), jobs.c.priority.label("place")).group_by(jobs.c.priority).order_by("place")
ADD = sa.insert(events)
LINE = {"timestamp": 1.25, "level": "INFO", "source": "USER", "message": "40%|████"}


def test_rows_are_those_of_sqlalchemy(store: Store, submit: Submit) -> None:
    request_id = submit(tags='{"team": "ü"}', transient=True, start_within_s=60.0)
    with store.database.read() as connection:
        (theirs,) = connection.execute(ONE, {"wanted": request_id})
        for _ in range(2):  # prepared, then found
            (ours,) = store.database.statements.rows(connection, ONE, {"wanted": request_id})
            assert ours._asdict() == dict(theirs._mapping)
    assert (ours.state, ours.transient, type(ours.start_by)) == (JobState.IN_QUEUE, True, float)


def test_text_that_no_database_holds_is_replaced(store: Store, submit: Submit) -> None:
    submit()
    with store.database.write() as connection:
        job_id = connection.execute(sa.select(jobs.c.id)).scalar_one()
        lines = [{**LINE, "job_id": job_id, "message": message} for message in ("a\0b", "a\ud800b", "ü")]
        store.database.statements.each(connection, ADD, lines)
    with store.database.read() as connection:
        told = connection.execute(sa.select(events.c.message).order_by(events.c.id)).scalars().all()
    assert told == ["a\N{REPLACEMENT CHARACTER}b", "a?b", "ü"]


def test_columns_may_have_no_name(store: Store, submit: Submit) -> None:
    for priority in (Priority.LOW, Priority.NORMAL, Priority.LOW):
        submit(priority=priority)
    with store.database.read() as connection:
        rows = store.database.statements.rows(connection, COUNT, {})
    assert [tuple(row) for row in rows] == [(1, Priority.NORMAL), (2, Priority.LOW)]


def test_what_returns_nothing_gives_no_rows(store: Store, submit: Submit) -> None:
    submit()
    with store.database.write() as connection:
        job_id = connection.execute(sa.select(jobs.c.id)).scalar_one()
        assert store.database.statements.rows(connection, ADD, {**LINE, "job_id": job_id}) == []
        assert connection.execute(sa.select(sa.func.count()).select_from(events)).scalar_one() == 1


def test_a_transaction_that_fails_takes_its_statements_along(store: Store, submit: Submit) -> None:
    request_id = submit()

    def fail_midway() -> None:
        with store.database.write() as connection:
            store.database.statements.rows(connection, sa.delete(jobs), {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert store.views.status(request_id) is not None


@pytest.mark.parametrize("values", [{}, {"wantd": "x"}, {"wanted": "x", "state": "IN_QUEUE"}])
def test_values_under_other_names_are_refused(store: Store, values: dict[str, object]) -> None:
    with store.database.read() as connection, pytest.raises(ValueError, match="are not the values of: SELECT"):
        store.database.statements.rows(connection, ONE, values)


def test_a_list_of_any_length_is_refused(store: Store) -> None:
    several = sa.select(jobs).where(jobs.c.state.in_([JobState.IN_QUEUE, JobState.IN_PROGRESS]))
    with store.database.read() as connection, pytest.raises(ValueError, match="each length of a list"):
        store.database.statements.rows(connection, several, {})
