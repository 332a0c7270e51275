"""The Ray that this process uses: one that it has, one that runs already, or one of its own."""

import functools
import logging
import os
import socket
import threading
from collections.abc import Callable

from blockroll.errors import MissingDependency, ReplicaError

try:
    import ray
    from ray._private.services import canonicalize_bootstrap_address
except ImportError as missing:
    raise MissingDependency(
        "Ray is not installed; install it with pip install 'blockroll[ray]', or use rollout.backend=local"
    ) from missing

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 5.0
_lock = threading.Lock()
_num_users = 0  # pools of this process that use a connection made here
_made: tuple[str, str] | None = None  # that connection


def connection() -> tuple[str, str] | None:
    """This process's connection to Ray: no other has the same node and job. None if there is none."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()


def connect(address: str | None = None) -> Callable[[], None]:
    """Connect this process to Ray. Gives what undoes it, to be called once.

    A connection that somebody else has made is used and left alone. Otherwise the cluster at `address` is
    joined, the one that `RAY_ADDRESS` names, or the one that `ray start` left running here; if there is none,
    one is started. Its last user here disconnects, which ends a cluster only if it was started here.
    ReplicaError if a cluster is named and does not answer.
    """
    global _num_users, _made
    with _lock:
        if not ray.is_initialized():
            _init(address)
            _num_users, _made = 0, connection()
        elif connection() != _made:
            return _leave_alone
        _num_users += 1
        return functools.partial(_disconnect, _made)


def ray_address() -> str:
    """Where other processes find the Ray of this one, as host:port."""
    address: str = ray.get_runtime_context().gcs_address
    return address


def _init(address: str | None) -> None:
    named = address or os.environ.get("RAY_ADDRESS")
    if not _answers(named):
        if named:
            raise ReplicaError(
                f"no Ray cluster answers at {named}: start it, set RAY_ADDRESS to another one, or to 'local' "
                "for one of this process's own"
            )
        logger.warning("the Ray cluster that `ray start` left here does not answer; another one is started")
        address = "local"
    try:
        # Without an address Ray itself looks for a running cluster. Resources may be named only for one that
        # is started; by default it has all cores of this machine.
        ray.init(
            address=address,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=True,
        )
    except (ConnectionError, TimeoutError, RuntimeError) as error:
        where = named or "this machine"
        if _asks_for_a_token(error):
            raise ReplicaError(
                f"the Ray cluster at {where} asks for a token: set RAY_AUTH_MODE=token, with its token in "
                "~/.ray/auth_token or RAY_AUTH_TOKEN, or start the cluster with RAY_AUTH_MODE=disabled"
            ) from error
        raise ReplicaError(f"Ray could not be reached at {where}: {error}") from error


def _asks_for_a_token(error: BaseException) -> bool:
    """Ray gives a cluster that an address names no token, unless RAY_AUTH_MODE says so."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    # Where Ray gives up asking, the last refusal is in its text alone; old Rays have no such error.
    return any("AuthenticationError" in f"{type(each).__name__}: {each}" for each in causes)


def _answers(address: str | None) -> bool:
    """Whether something listens where Ray would connect, if it would: Ray itself asks for minutes."""
    if address is not None and "://" in address:
        return True
    try:
        where: str | None = canonicalize_bootstrap_address(address)  # type: ignore[arg-type]
        if where is None:
            return True
        host, _, port = where.rpartition(":")
        there = (host.strip("[]"), int(port))
    except ValueError:
        raise ReplicaError(
            f"{address!r} is no address of a Ray cluster: give RAY_ADDRESS as host:port, 'auto' or 'local'"
        ) from None
    try:
        with socket.create_connection(there, timeout=_ANSWER_TIMEOUT_S):
            return True
    except (OSError, OverflowError):  # no port is that large
        return False


def _leave_alone() -> None:
    """Somebody else's connection."""


def _disconnect(made: tuple[str, str] | None) -> None:
    """Nothing, where somebody has ended that connection: what there is now is not ours."""
    global _num_users, _made
    with _lock:
        if made is None or connection() != made:
            return
        _num_users -= 1
        if not _num_users:
            ray.shutdown()
            _made = None
