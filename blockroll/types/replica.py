"""Weight updates, what replicas answer to them, and what they say of themselves."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Where one tensor lies in a weight update."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as in safetensors and torch: "float32"
    bucket: int
    offset: int  # bytes from the start of its bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """Ordered tensors of an update and one checksum per bucket."""

    tensors: tuple[TensorSpec, ...]
    bucket_checksums: tuple[str, ...]  # hexadecimal, of each bucket's bytes
    checksum: str  # of the whole: what every replica reports once it serves this version


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """One published policy version. Buckets are byte arrays, or references that a transport resolves."""

    version: int
    base_version: int  # the version it follows
    kind: Literal["full"]
    manifest: WeightManifest
    buckets: tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReceipt:
    """One replica's answer to a weight update."""

    replica_id: int
    accepted: bool
    version: int  # the version the replica holds now
    checksum: str  # recomputed from the weights it holds now
    error: str | None = None  # class and message of the refusal


ReplicaState = Literal["READY", "STALE", "DEAD"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaHealth:
    """What a replica says of itself."""

    version: int
    checksum: str
    num_requests: int  # waiting and running
    num_threads: int  # torch threads of its process
    pid: int
