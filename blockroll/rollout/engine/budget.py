"""How much of a device keys and values may take: bytes in, rows out. Nothing here asks a device."""

from dataclasses import dataclass

from blockroll.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheBudget:
    """What one engine's cache may have: its share of the device, as far as that is free behind the weights.

    Engines that share a device share what is free. Of its part an engine leaves what a forward takes, but
    half at most: that is an estimate, and a batch that turns out too large is made smaller.
    """

    total: int  # bytes of the device
    free: int  # of them, once the weights are there
    share: float  # of the device, for the cache of one engine
    forward: int = 0  # about what a forward takes
    num_engines: int = 1  # that share what is free
    row: int  # bytes of the keys and values of a token
    beside: int = 0  # bytes that the cache takes whatever its rows are: states of slots
    snapshot: int = 0  # bytes of a state that is kept along the rows,
    snapshot_rows: int = 1  # and rows from one to the next
    max_rows: int = 0  # above 0: this many rows, whatever there is

    @property
    def asked(self) -> int:
        """Bytes that the share comes to."""
        return int(self.total * self.share)

    @property
    def left(self) -> int:
        """Bytes that are free for it."""
        free = max(self.free, 0) // self.num_engines
        return max(free - self.forward, free // 2)

    @property
    def is_scarce(self) -> bool:
        """Whether it has less than its share, because less is free."""
        return not self.max_rows and self.left < self.asked

    @property
    def rows(self) -> int:
        """Rows that the cache may have over all texts."""
        there = max(min(self.asked, self.left) - self.beside, 0)
        return self.max_rows or there * self.snapshot_rows // (self.row * self.snapshot_rows + self.snapshot)

    def check(self, least_rows: int) -> None:
        """InvalidInput, with the numbers, where it has not even the rows of the shortest text."""
        if self.rows >= least_rows:
            return
        if self.max_rows:
            raise InvalidInput(
                f"max_cache_rows is {self.max_rows}, and a text of one token takes {least_rows} rows with "
                "what a step writes behind it: give more, or 0 for what memory_fraction says"
            )
        states = f", beside {size(self.beside)} of states of all slots" if self.beside else ""
        raise InvalidInput(
            f"keys and values of a text of one token take {size(least_rows * self.row)}{states}, and there "
            f"are {size(min(self.asked, self.left))} for them: memory_fraction {self.share:g} of "
            f"{size(self.total)} is {size(self.asked)}, and {size(self.free)} are free for "
            f"{self.num_engines} engines; raise memory_fraction, free memory, or take fewer replicas, "
            f"{'a smaller max_batch_size, ' if self.beside else ''}another dtype or a smaller policy"
        )


def size(num_bytes: int) -> str:
    """Bytes in words, as 1.5 GB."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if abs(num_bytes) >= 10**power:
            return f"{num_bytes / 10**power:.3g} {unit}"
    return f"{num_bytes} bytes"
