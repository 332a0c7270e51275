"""What replicas look drafts up in, as files of one folder: one of each replica."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from blockroll.errors import ReplicaError
from blockroll.rollout.pool.calls import Member

logger = logging.getLogger(__name__)

_NAME = "history_{}.safetensors"


def save_histories(members: Sequence[Member], folder: Path, first: int) -> None:
    """Write a file of each living replica, numbered from `first`. One that dies meanwhile writes none."""
    for number, member in enumerate(members, first):
        if member.state == "DEAD":
            continue
        try:
            member.replica.save_history(folder / _NAME.format(number))
        except ReplicaError as death:
            logger.warning("the history of replica %d is not written: %s", number, death)


def load_histories(members: Sequence[Member], folder: Path, first: int) -> None:
    """Give each living replica the file of its number; where there is none, several take one."""
    found = {path: re.fullmatch(_NAME.format(r"(\d+)"), path.name) for path in folder.glob("history_*")}
    numbered = sorted((int(match[1]), path) for path, match in found.items() if match)
    if members and not numbered:
        logger.info("there is no history in %s: replicas begin without earlier texts", folder)
        return
    of_number = dict(numbered)
    for number, member in enumerate(members, first):
        if member.state != "DEAD":
            _, another = numbered[number % len(numbered)]
            member.replica.load_history(of_number.get(number, another))
