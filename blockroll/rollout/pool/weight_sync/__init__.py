"""Weights on their way from a learner to replicas: packed, checked, then swapped."""

from blockroll.rollout.pool.weight_sync.buckets import (
    make_update,
    named_adapter_weights,
    named_weights,
    unwrapped,
    weights_checksum,
)

__all__ = ["make_update", "named_adapter_weights", "named_weights", "unwrapped", "weights_checksum"]
