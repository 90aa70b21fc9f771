"""Where many jobs stand, in one look: the same as one by one, on both databases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kontextd_server.store import CANCELLED, Claim, Failure, Priority, Store, Success
from kontextd_server.store import polls as polls_module
from kontextd_server.store.polls import JobStatus, Polls

Submit = Callable[..., str]
Take = Callable[..., Claim]


@pytest.fixture
def polls(store: Store) -> Polls:
    return Polls(store.database)


def one_by_one(store: Store, request_ids: list[str]) -> dict[str, JobStatus]:
    jobs = [store.views.status(request_id) for request_id in request_ids]
    names = JobStatus.__dataclass_fields__
    return {job.request_id: JobStatus(**{name: getattr(job, name) for name in names}) for job in jobs if job}


def test_many_are_told_what_each_would_be_told_alone(store: Store, polls: Polls, submit: Submit, claim: Take) -> None:
    ids = []
    for ending in (Success(b"{}", 1.5), Failure("image_too_large", 422, b"{}"), CANCELLED):
        ids.append(submit(owner="bert"))
        store.leases.finish(claim().lease, ending)
    ids.append(submit())
    claim()
    ids += [submit(priority=priority) for priority in (Priority.LOW, Priority.NORMAL, Priority.LOW, Priority.NORMAL)]
    told = polls.statuses([*ids, "unknown"])
    assert told == one_by_one(store, ids)
    assert [told[request_id].queue_position for request_id in ids[4:]] == [2, 0, 3, 1]


@pytest.mark.parametrize("wanted", [[0], [5], [7, 2], [0, 7], list(range(8))])
def test_places_do_not_depend_on_who_else_asks(polls: Polls, submit: Submit, wanted: list[int]) -> None:
    ids = [submit() for _ in range(8)]
    told = polls.statuses([ids[number] for number in wanted])
    assert {ids.index(request_id): job.queue_position for request_id, job in told.items()} == {n: n for n in wanted}


def test_more_than_one_statement_takes_are_told_alike(
    polls: Polls, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polls_module, "_MOST", 4)
    ids = [submit() for _ in range(11)]
    told = polls.statuses(ids)
    assert [told[request_id].queue_position for request_id in ids] == list(range(11))


def test_nobody_and_unknown_ones_are_nothing(polls: Polls) -> None:
    assert polls.statuses([]) == {}
    assert polls.statuses(["unknown", "\0"]) == {}


def test_a_job_that_is_claimed_between_the_two_reads_is_the_first_in_the_queue(
    polls: Polls, submit: Submit, claim: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, places = submit(), submit(), polls_module._places

    def claimed_meanwhile(*args: object) -> object:
        claim()
        return places(*args)

    monkeypatch.setattr(polls_module, "_places", claimed_meanwhile)
    told = polls.statuses([first, second])
    assert [told[request_id].queue_position for request_id in (first, second)] == [0, 0]
