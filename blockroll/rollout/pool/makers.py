"""Pools and replicas from options: the one place here that knows how policies and tokenizers are loaded."""

import dataclasses
import functools
import logging
import os
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, assert_never

import torch

from blockroll.config import PolicyConfig, RolloutConfig
from blockroll.errors import InvalidInput
from blockroll.policies.hf import HFPolicy
from blockroll.policies.loading import load_tokenizer, resolve_checkpoint, resolve_device
from blockroll.rollout.audit.writer import AuditWriter
from blockroll.rollout.calibration.observer import Calibration
from blockroll.rollout.drafters.engine import Engine
from blockroll.rollout.drafters.history import HistoryDrafts
from blockroll.rollout.engine.trace import Watcher
from blockroll.rollout.pool.memory import CachePlan, DeviceMemory, num_sharing, plan_of
from blockroll.rollout.pool.pool import RolloutPool
from blockroll.rollout.pool.replica import LocalReplica, Replica
from blockroll.rollout.pool.weight_sync.buckets import dtype_name
from blockroll.types.bounds import hints_of
from blockroll.types.names import unknown_option

logger = logging.getLogger(__name__)

CLIENT_TIMEOUT_S = 600.0  # of a process that shares a replica: longer than anybody learns between two polls


def make_pool(policy: PolicyConfig, config: RolloutConfig) -> RolloutPool:
    """The pool of the kind of replica that a config asks for."""
    match config.replica_kind:
        case "ray":
            return make_ray_pool(policy, config)
        case "local":
            return make_local_pool(policy, config)
        case other:
            assert_never(other)


def make_local_pool(policy: PolicyConfig, config: RolloutConfig) -> RolloutPool:
    """Engines in this process."""
    pool_id = uuid.uuid4().hex
    replicas = [
        build_replica(policy, config, replica_id=index, pool_id=pool_id)
        for index in range(config.num_replicas)
    ]
    return _pool(replicas, policy, config)


def pool_from_options(path: str | os.PathLike[str], options: Mapping[str, Any]) -> RolloutPool:
    """As `RolloutPool.from_pretrained`."""
    policy_names, rollout_names = hints_of(PolicyConfig).keys() - {"path"}, hints_of(RolloutConfig).keys()
    for name in options:
        if name not in policy_names | rollout_names:
            raise unknown_option("RolloutPool.from_pretrained", name, policy_names | rollout_names)
    if isinstance(options.get("dtype"), torch.dtype):
        options = {**options, "dtype": dtype_name(options["dtype"])}
    policy = PolicyConfig(
        path=os.fspath(path), **{name: options[name] for name in policy_names & options.keys()}
    )
    config = RolloutConfig(
        **{"num_replicas": 1, **{name: options[name] for name in rollout_names & options.keys()}}
    )
    if config.backend is None and config.placement is None:
        config = dataclasses.replace(config, backend="local")
    _refuse_without_effect(options, config)
    config.sampling()  # refuses what does not go together before anything is loaded
    return make_pool(policy, config)


def _refuse_without_effect(given: Collection[str], config: RolloutConfig) -> None:
    """InvalidInput for an option that was given, and that others leave without a meaning."""
    for names, has_effect, needed in (
        (("threads_per_replica", "gpus_per_replica"), config.replica_kind == "ray", "backend='ray'"),
        (("share_history",), config.num_replicas > 1, "num_replicas above 1"),
        (("audit_share",), config.audit == "share", "audit='share'"),
        (("audit_dir",), config.audit != "off", "audit='all' or audit='share'"),
        (("check_sync",), False, "a TRL trainer's RolloutConfig"),
    ):
        for name in names:
            if name in given and not has_effect:
                raise InvalidInput(f"{name} has an effect only with {needed}: add that, or leave it out")


def make_ray_pool(
    policy: PolicyConfig,
    config: RolloutConfig,
    *,
    name: str | None = None,
    taken_devices: Sequence[str] = (),
    client_timeout_s: float = CLIENT_TIMEOUT_S,
) -> RolloutPool:
    """One actor per replica, in the Ray that `ray_cluster.connect` finds or starts.

    With a `name` other processes can join: `join_ray_pool(name, ...)`. What one of them leaves behind ends
    when it has asked nothing for `client_timeout_s`, and a replica that has not taken an update in that time
    is ended. Closing the pool ends its actors, and Ray if it was started for them. InvalidInput if Ray gives
    a replica one of the `taken_devices`, named host:index.
    """
    from blockroll.rollout.pool.ray_cluster import connect
    from blockroll.rollout.pool.ray_replica import RayReplica, check_disjoint, put_buckets

    policy = dataclasses.replace(policy, path=str(resolve_checkpoint(policy.path).resolve()))
    num_gpus = config.gpus_per_replica if resolve_device(policy.device).type == "cuda" else 0
    pool_id = uuid.uuid4().hex
    with ExitStack() as undo:
        disconnect = connect()
        undo.callback(disconnect)
        replicas = []
        for index in range(config.num_replicas):
            replica = RayReplica.start(
                index,
                functools.partial(build_replica, policy, config, replica_id=index, pool_id=pool_id),
                num_threads=config.threads_per_replica,
                num_gpus=num_gpus,
                name=name and f"{name}-{index}",
                client_timeout_s=client_timeout_s,
            )
            undo.callback(replica.close)
            replicas.append(replica)
        for replica in replicas:
            replica.wait_until_ready()
        check_disjoint(taken_devices, [each for replica in replicas for each in replica.devices()])
        pool = _pool(replicas, policy, config, transport=put_buckets, on_close=disconnect)
        undo.pop_all()
    return pool


def join_ray_pool(name: str, policy: PolicyConfig, config: RolloutConfig, *, address: str) -> RolloutPool:
    """A pool over actors that another process has made; it sends them requests, and no weights."""
    from blockroll.rollout.pool.ray_cluster import connect
    from blockroll.rollout.pool.ray_replica import RayReplica

    with ExitStack() as undo:
        disconnect = connect(address)
        undo.callback(disconnect)
        replicas = [RayReplica.join(index, f"{name}-{index}") for index in range(config.num_replicas)]
        for replica in replicas:
            replica.wait_until_ready()
        pool = _pool(replicas, policy, config, on_close=disconnect, is_joined=True)
        undo.pop_all()
    return pool


def build_replica(
    policy: PolicyConfig, config: RolloutConfig, *, replica_id: int = 0, pool_id: str | None = None
) -> LocalReplica:
    """Load the policy and put an engine around it."""
    loaded = HFPolicy.from_pretrained(
        policy.path,
        device=policy.device,
        dtype=policy.dtype,
        adapter=policy.adapter,
        prepack=policy.prepack,
        compile=policy.compile,
    )
    num_engines = num_sharing(config, loaded.device)
    return replica_around(loaded, config, replica_id=replica_id, pool_id=pool_id, num_engines=num_engines)


def replica_around(
    policy: HFPolicy,
    config: RolloutConfig,
    *,
    replica_id: int = 0,
    pool_id: str | None = None,
    num_engines: int = 1,
) -> LocalReplica:
    """Put an engine around a policy that is there already.

    `pool_id` is the same for all replicas of a pool, and no other's: the audit tells pools apart by it. The
    memory that is free is shared by so many engines.
    """
    audit = _audit(config, replica_id, pool_id)
    every = config.watch_every or 0
    calibration = Calibration(replica_id) if every else None
    plan = plan_of(policy, config)
    cache = CachePlan.of(policy, config, plan, DeviceMemory.of(policy.device), num_engines=num_engines)
    if cache.budget.is_scarce:
        logger.warning(cache.notice)
    engine = Engine(
        policy,
        plan=plan,
        reproducible=config.reproducible,
        max_batch_size=config.max_batch_size,
        prefill_chunk=config.prefill_chunk,
        max_length=config.max_length,
        max_cache_rows=cache.budget.rows,
        cache=config.cache,
        page_size=config.page_size,
        graphs=config.graphs,
        overlap=config.overlap,
        kernels=config.kernels,
        observers=[
            *([] if audit is None else [audit]),
            *([] if calibration is None else [Watcher(calibration, every=every)]),
        ],
        drafters=[HistoryDrafts(max_tokens=config.history_tokens)] if config.history_tokens else (),
    )
    replica = LocalReplica(
        engine,
        policy.model,
        adapter=policy.adapter,
        replica_id=replica_id,
        check_finite_weights=config.check_finite_weights,
        calibration=calibration,
        **({} if audit is None else {"on_close": audit.flush}),
    )
    if engine.planner is not None and not policy.can_draft:
        replica.notice = (
            "plan 'auto' drafts from history alone, because this policy has no drafts of its own; `blockroll "
            "convert` teaches it some without changing its weights, and they are given as `adapter`"
        )
    return replica


def _pool(
    replicas: Sequence[Replica],
    policy: PolicyConfig,
    config: RolloutConfig,
    *,
    transport: Callable[..., Any] | None = None,
    on_close: Callable[[], None] | None = None,
    is_joined: bool = False,
) -> RolloutPool:
    logger.info("kernels: %s", "; ".join(dict.fromkeys(each.kernels for each in replicas)))
    notice = next((each.notice for each in replicas if each.notice is not None), None)
    if notice is not None:
        logger.warning(notice)
    return RolloutPool(
        replicas,
        requests_per_replica=2 * config.max_batch_size,
        transport=transport,
        on_close=on_close,
        tokenizer=load_tokenizer(policy.path),
        sampling=config.sampling(allow_truncated_mix=True),
        weights_dtype=getattr(torch, policy.dtype),
        is_joined=is_joined,
        share_history=config.share_history,
        sibling_by_sibling=config.group_order == "sibling_by_sibling",
    )


def _audit(config: RolloutConfig, replica_id: int, pool_id: str | None) -> AuditWriter | None:
    if config.audit == "off":
        return None
    if not config.audit_dir:
        raise InvalidInput(f"audit is {config.audit!r}, but audit_dir names no folder to write to")
    share = config.audit_share if config.audit == "share" else 1.0
    return AuditWriter(config.audit_dir, share=share, replica_id=replica_id, pool_id=pool_id)
