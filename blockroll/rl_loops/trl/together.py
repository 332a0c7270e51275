"""Ranks of one job stop together: one's error is raised on all, by name, before a collective times out."""

from typing import Any

from accelerate.utils import gather_object

from blockroll.errors import BlockrollError, RankError


def raise_together(accelerator: Any, error: BlockrollError | None, doing: str) -> None:
    """All ranks call it at the same place; each raises its own error, or the error of another rank."""
    if accelerator.num_processes > 1:
        reports: list[str | None] = gather_object(
            [None if error is None else f"{type(error).__name__}: {error}"]
        )
        failed = {rank: report for rank, report in enumerate(reports) if report is not None}
    else:
        failed = {}
    if error is not None:
        raise error
    if failed:
        rank, report = next(iter(failed.items()))
        raise RankError(f"rank {rank} failed while {doing}, so every rank stops: {report}")
