"""One replica under several clients: each has its own rollouts, and what one leaves behind is bounded."""

import dataclasses

import pytest

from blockroll.rollout.pool import shared
from blockroll.rollout.pool.shared import SharedReplica
from tests.invariants.test_calls import asked, check_complete
from tests.invariants.test_pool import local_replica


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def shared_replica(**options):
    clock, replica = Clock(), local_replica()
    return SharedReplica(replica, client_timeout_s=10, clock=clock, **options), replica, clock


def read(server, name, count):
    finished = []
    for _ in range(1000):
        finished += server.poll(name)
        if len(finished) >= count:
            return finished
    raise AssertionError(f"{name} got {len(finished)} of {count}")


def two_clients():
    server, replica, _ = shared_replica()
    one, two = asked(5, seed=1), asked(5, seed=2)
    for name, requests in (("one", one), ("two", two)):
        server.enter(name)
        assert server.submit(requests, name)
    check_complete(one, read(server, "one", 5))
    check_complete(two, read(server, "two", 5))
    assert replica.engine.num_requests == 0


def test_clients_with_the_same_ids_get_their_own_rollouts():
    two_clients()


def test_planted_ids_of_one_client_that_stand_for_all_are_noticed(monkeypatch):
    monkeypatch.setattr(shared, "free_alias", lambda request_id, *taken: request_id)
    with pytest.raises((AssertionError, ValueError)):
        two_clients()


def test_an_abort_ends_the_requests_of_its_client_alone():
    server, _, _ = shared_replica()
    one, two = asked(5, seed=1), asked(5, seed=2)
    for name, requests in (("one", one), ("two", two)):
        server.enter(name)
        server.submit(requests, name)
    finished = list(server.poll("two"))
    ended = server.abort([request.request_id for request in one], "one")
    assert {each.request for each in ended} == set(one)
    check_complete(two, [*finished, *read(server, "two", 5 - len(finished))])


def test_what_a_silent_client_leaves_ends_when_others_ask_and_it_can_come_back():
    server, replica, clock = shared_replica()
    for name in ("gone", "there"):
        server.enter(name)
    left = asked(5, seed=1, shortest=60, step=1)
    server.submit(left, "gone")
    clock.now = 9.0
    assert server.poll("there") == ()
    assert replica.engine.num_requests > 0
    clock.now = 11.0
    server.poll("there")
    assert replica.engine.num_requests == 0
    assert server.poll("gone") is None
    assert not server.submit(left, "gone")
    server.enter("back")
    assert server.submit(left, "back")
    check_complete(left, read(server, "back", 5))


def test_an_error_names_the_request_as_its_client_does():
    server, replica, _ = shared_replica()
    (request,) = asked(1, seed=1)
    for name in ("one", "two"):
        server.enter(name)
        server.submit([request], name)
    step = replica.engine.step

    def fails():
        result = step()
        finished = (
            dataclasses.replace(each, error=f"bad numbers for request {each.request.request_id!r}")
            for each in result.finished
        )
        return dataclasses.replace(result, finished=tuple(finished))

    replica.engine.step = fails
    for name in ("one", "two"):
        (rollout,) = read(server, name, 1)
        assert rollout.error == "bad numbers for request 'r0'"
