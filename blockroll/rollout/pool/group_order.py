"""In which order the requests of a call are handed to replicas."""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator

from blockroll.types import Request

_MOST_PROMPTS = 1 << 16  # that are known to have been asked; of others the first epoch comes again


class GroupOrder:
    """Groups as they are asked; or, of prompts that were never asked before, sibling by sibling.

    Sibling by sibling, the first sibling of every group comes first, then the second of every group: later
    ones are drafted from those that have ended. It is an order, not a wait: where there are fewer groups than
    slots, siblings run side by side all the same.
    """

    def __init__(self, *, sibling_by_sibling: bool = False) -> None:
        self._is_by_sibling = sibling_by_sibling
        self._asked: OrderedDict[int, None] = OrderedDict()  # hashes of prompts

    def waiting(self, requests: Iterable[Request]) -> deque[list[Request]]:
        """What replicas are handed, one after the other: whole groups, or siblings of new prompts.

        Of several priorities the highest first.
        """
        if not self._is_by_sibling:
            return _ranked(groups(requests))
        rounds: list[list[list[Request]]] = []
        asked = []
        for group in groups(requests):
            prompt = hash(tuple(group[0].prompt_ids))
            asked.append(prompt)
            parts = [group] if prompt in self._asked else [[request] for request in group]
            rounds.extend([] for _ in range(len(parts) - len(rounds)))
            for each, part in zip(rounds, parts, strict=False):
                each.append(part)
        for prompt in asked:
            self._asked[prompt] = None
            self._asked.move_to_end(prompt)
        while len(self._asked) > _MOST_PROMPTS:
            self._asked.popitem(last=False)
        return _ranked(part for each in rounds for part in each)


def groups(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """Requests by group, in order of first appearance; a request without a group is one of its own."""
    found: dict[str, list[Request]] = {}
    for request in requests:
        key = f"group {request.group_id}" if request.group_id is not None else f"request {request.request_id}"
        found.setdefault(key, []).append(request)
    yield from found.values()


def _ranked(parts: Iterable[list[Request]]) -> deque[list[Request]]:
    """Higher priorities first; a part has that of its highest."""
    return deque(sorted(parts, key=lambda part: -max(request.priority for request in part)))
