"""What moves between the parts of blockroll: requests, rollouts, drafts, verdicts, plans and laws."""

from blockroll.types.plan import DRAFTERS, HISTORY, MASK_ROWS, PLAIN, Law, Plan, PlanKind
from blockroll.types.replica import (
    ReplicaHealth,
    ReplicaState,
    TensorSpec,
    UpdateReceipt,
    WeightManifest,
    WeightUpdate,
)
from blockroll.types.rollout import (
    Commit,
    FinishedText,
    FinishReason,
    Prefix,
    Request,
    Rollout,
    RolloutStats,
)
from blockroll.types.rows import Rows
from blockroll.types.sampling import Constraint, Guide, LogitsProcessor, Sampling, SamplingOptions
from blockroll.types.steps import RequestStep, StepCounts, counted
from blockroll.types.verdict import POINT_MASS, Draft, Evidence, PointMass, RowFault, Verdict

__all__ = [
    "DRAFTERS",
    "HISTORY",
    "MASK_ROWS",
    "PLAIN",
    "POINT_MASS",
    "Commit",
    "Constraint",
    "Draft",
    "Evidence",
    "FinishReason",
    "FinishedText",
    "Guide",
    "Law",
    "LogitsProcessor",
    "Plan",
    "PlanKind",
    "PointMass",
    "Prefix",
    "ReplicaHealth",
    "ReplicaState",
    "Request",
    "RequestStep",
    "Rollout",
    "RolloutStats",
    "RowFault",
    "Rows",
    "Sampling",
    "SamplingOptions",
    "StepCounts",
    "TensorSpec",
    "UpdateReceipt",
    "Verdict",
    "WeightManifest",
    "WeightUpdate",
    "counted",
]
