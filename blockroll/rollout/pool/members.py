"""What a pool asks of one replica, and what becomes of it where that fails."""

import logging
from typing import NamedTuple

from blockroll.errors import ReplicaError
from blockroll.rollout.calibration.evidence import Evidence
from blockroll.rollout.pool.calls import Member
from blockroll.rollout.pool.replica import Replica
from blockroll.types import UpdateReceipt, WeightUpdate

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """The last receipt, and whether one came before it that was a refusal."""

    receipt: UpdateReceipt
    was_refused: bool


def refit(member: Member, update: WeightUpdate) -> Answer:
    """Hand it over; a replica that dies is DEAD from then on, and its receipt says so."""
    was_refused = False
    try:
        receipt = member.replica.update(update)
        if not receipt.accepted:
            was_refused = True
            logger.warning("replica %d refused, trying once more: %s", receipt.replica_id, receipt.error)
            receipt = member.replica.update(update)
    except ReplicaError as death:
        member.state, member.error = "DEAD", death
        logger.error("%s", death)
        receipt = UpdateReceipt(
            replica_id=member.replica.replica_id,
            accepted=False,
            version=-1,
            checksum="",
            error=str(death),
        )
    return Answer(receipt, was_refused)


def holds(receipt: UpdateReceipt, update: WeightUpdate) -> bool:
    """Whether the replica has just the weights that were sent."""
    return (receipt.version, receipt.checksum) == (update.version, update.manifest.checksum)


def evidence_of(replica: Replica) -> Evidence:
    """What it has seen since it was asked last; of one that is dead nothing, which is logged."""
    try:
        return replica.take_evidence()
    except ReplicaError as death:
        logger.warning("no evidence of replica %d: %s", replica.replica_id, death)
        return Evidence()
