"""Ranks of one job stop together: one's error is raised on all, by name, before a collective times out.

A rank that is gone cannot report. Gloo notices at once that its connection is closed; NCCL notices when its
timeout has passed, so there it is the launcher that ends the others.
"""

from typing import Any

from accelerate.utils import gather_object

from blockroll.errors import RankError


def raise_together(accelerator: Any, error: Exception | None, doing: str) -> None:
    """All ranks call it at the same place; each raises its own error, or the error of another rank."""
    if accelerator.num_processes > 1:
        own = None if error is None else f"{type(error).__name__}: {error}"
        try:
            reports: list[str | None] = gather_object([own])
        except RuntimeError as broken:
            raise RankError(
                f"rank {accelerator.process_index} could not hear from all {accelerator.num_processes} ranks "
                f"after {doing}: one has died ({broken})" + (f"; its own error: {own}" if own else "")
            ) from (error or broken)
        failed = {rank: report for rank, report in enumerate(reports) if report is not None}
    else:
        failed = {}
    if error is not None:
        raise error
    if failed:
        rank, report = next(iter(failed.items()))
        raise RankError(f"rank {rank} failed while {doing}, so every rank stops: {report}")
