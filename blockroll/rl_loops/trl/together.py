"""Ranks of one job stop together: one's error is raised on all, by name, before a collective times out.

A rank that is gone cannot report. Gloo notices at once that its connection is closed; NCCL notices when its
timeout has passed, so there it is the launcher that ends the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object

from blockroll.errors import RankError


@contextmanager
def together(accelerator: Any, doing: str) -> Iterator[None]:
    """All ranks run the body, in which no rank waits for another; whatever one raises reaches all of them."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as failure:  # noqa: BLE001 raised below, on every rank: out of memory, Ctrl-C too
        error = failure
    raise_together(accelerator, error, doing)


def on_any(accelerator: Any, here: bool) -> bool:
    """Whether it is so on any rank. All ranks call it."""
    return here if accelerator.num_processes == 1 else any(gather_object([here]))


def raise_together(accelerator: Any, error: BaseException | None, doing: str) -> None:
    """All ranks call it at the same place; each raises its own error, or the error of another rank.

    A rank may bring an error of what it was `doing` before, and so be where the others do something else.
    """
    if accelerator.num_processes > 1:
        own = None if error is None else f"{type(error).__name__}: {error}"
        try:
            reports: list[tuple[str, str | None]] = gather_object([(doing, own)])
        except RuntimeError as broken:
            raise RankError(
                f"rank {accelerator.process_index} could not hear from all {accelerator.num_processes} ranks "
                f"after {doing}: one has died ({broken})" + (f"; its own error: {own}" if own else "")
            ) from (error or broken)
        failed = {rank: report for rank, report in enumerate(reports) if report[1] is not None}
    else:
        failed = {}
    if error is not None:
        raise error
    if failed:
        rank, (doing, report) = next(iter(failed.items()))
        raise RankError(f"rank {rank} failed while {doing}, so every rank stops: {report}")
