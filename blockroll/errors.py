"""Every error that blockroll raises on purpose.

    BlockrollError
    ├── InvalidInput (ValueError)            a request, argument or option that cannot be served
    │   ├── ConfigError                      an unknown key or a value outside its range in a config
    │   ├── AdapterMismatch                  a draft adapter is missing or of another architecture
    │   └── InvalidDraft                     a drafter gave what no step can verify
    ├── RunExists (FileExistsError)          the run folder is already there
    ├── RunInUse (RuntimeError)              another process works in the run folder
    ├── CheckpointError (RuntimeError)       a checkpoint is missing, incomplete or of another run
    ├── AuditError (RuntimeError)            rows of the audit could not be written; the next try has them
    ├── MissingDependency (ImportError)      an optional package is needed for what was asked
    ├── WeightSyncError (RuntimeError)       a weight update was refused; the old version goes on serving
    │   ├── BucketMissing                    a bucket of the update never arrived
    │   ├── ChecksumMismatch                 a bucket arrived with other bytes than were sent
    │   ├── ManifestMismatch                 names, shapes or dtypes are not the replica's own
    │   ├── NonFiniteWeights                 a tensor of the update holds NaN or infinity
    │   └── VersionMismatch                  the update does not follow the replica's version
    ├── ReplicaError (RuntimeError)          a replica died, hangs, or none is ready to serve
    │   └── StaleReplica                     its weights are not the pool's: it serves again after an update
    ├── ReplicaFault (RuntimeError)          something else than blockroll raised in a replica's process
    ├── RankError (RuntimeError)             another process of a distributed trainer failed
    ├── EnvironmentFailed (RuntimeError)     an environment was too slow, or raised
    ├── GuardStopped (RuntimeError)         a test of the guard spoke whose action is to stop the run
    ├── PeerFailed (RuntimeError)            a bench's engine in another process ended, hung or erred
    ├── NonFiniteLogits (FloatingPointError) a forward gave NaN or infinity for a request
    ├── OutOfMemory (RuntimeError)           a request alone has no room in memory; others go on
    ├── EmptySupport (RuntimeError)          constraint, masks and processors leave a request no next token
    └── RequestFailed (RuntimeError)         a request's own logits processor, constraint or text raised

Messages say what was given, what is allowed and what to do instead.
"""


class BlockrollError(Exception):
    """Root of the tree above."""


class InvalidInput(BlockrollError, ValueError):
    """A request, argument or option that cannot be served."""


class ConfigError(InvalidInput):
    """An unknown key or a value outside its range in a config."""


class AdapterMismatch(InvalidInput):
    """A draft adapter is missing or of another architecture."""


class InvalidDraft(InvalidInput):
    """A drafter gave what no step can verify; nothing was committed, and the step can be run again."""


class RunExists(BlockrollError, FileExistsError):
    """The run folder is already there."""


class RunInUse(BlockrollError, RuntimeError):
    """Another process works in the run folder."""


class CheckpointError(BlockrollError, RuntimeError):
    """A checkpoint is missing, incomplete or of another run."""


class AuditError(BlockrollError, RuntimeError):
    """Rows of the audit could not be written; the next try has them."""


class MissingDependency(BlockrollError, ImportError):
    """An optional package is needed for what was asked."""


class WeightSyncError(BlockrollError, RuntimeError):
    """A weight update was refused; the old version goes on serving."""


class BucketMissing(WeightSyncError):
    """A bucket of the update never arrived."""


class ChecksumMismatch(WeightSyncError):
    """A bucket arrived with other bytes than were sent."""


class ManifestMismatch(WeightSyncError):
    """Names, shapes or dtypes of the update are not the replica's own."""


class NonFiniteWeights(WeightSyncError):
    """A tensor of the update holds NaN or infinity."""


class VersionMismatch(WeightSyncError):
    """The update does not follow the replica's version."""


class ReplicaError(BlockrollError, RuntimeError):
    """A replica died, hangs, or none is ready to serve."""


class StaleReplica(ReplicaError):
    """A replica's weights are not those that were published last: it serves again after an update."""


class ReplicaFault(BlockrollError, RuntimeError):
    """What a replica ran in its own process raised an error that is not blockroll's; the replica lives."""


class RankError(BlockrollError, RuntimeError):
    """Another process of a distributed trainer failed."""


class EnvironmentFailed(BlockrollError, RuntimeError):
    """An environment was too slow, or raised."""


class GuardStopped(BlockrollError, RuntimeError):
    """A test of the guard spoke whose action is to stop the run; everything up to then is saved."""


class PeerFailed(BlockrollError, RuntimeError):
    """An engine that a bench measures in a process of its own ended, hung or gave what was not asked."""


class NonFiniteLogits(BlockrollError, FloatingPointError):
    """A forward gave NaN or infinity for a request."""


class OutOfMemory(BlockrollError, RuntimeError):
    """A step of one request alone had no room in memory; the request ends with what it had committed."""


class EmptySupport(BlockrollError, RuntimeError):
    """Constraint, masks and logits processors leave a request no next token."""


class RequestFailed(BlockrollError, RuntimeError):
    """What a request brings along raised: a logits processor, a constraint, or the decoding of its text."""
