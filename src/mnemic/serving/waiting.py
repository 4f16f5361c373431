"""The queue in front of the engine: tenants take turns, and each tenant's works are first come, first served."""

from collections import OrderedDict, deque
from typing import Generic, Protocol, TypeVar


class Waits(Protocol):
    @property
    def tenant(self) -> str: ...


Item = TypeVar("Item", bound=Waits)


class Waiting(Generic[Item]):
    def __init__(self) -> None:
        self._tenants: OrderedDict[str, deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

    def put(self, item: Item) -> None:
        self._tenants.setdefault(item.tenant, deque()).append(item)

    def take(self) -> Item:
        """The next one; its tenant goes to the end of the line. Raises `LookupError` where nobody waits."""
        tenant, queue = next(iter(self._tenants.items()), (None, None))
        if tenant is None or queue is None:
            raise LookupError("Nobody waits.")
        item = queue.popleft()
        if queue:
            self._tenants.move_to_end(tenant)
        else:
            del self._tenants[tenant]
        return item

    def sift(self, keep) -> list[Item]:
        """Take out, in order, all for which `keep(item)` is false."""
        out: list[Item] = []
        for tenant, queue in list(self._tenants.items()):
            # Asked once: the answer may change meanwhile.
            left: deque[Item] = deque()
            for item in queue:
                (left if keep(item) else out).append(item)
            if left:
                self._tenants[tenant] = left
            else:
                del self._tenants[tenant]
        return out
