"""Agreement of many ranks over a store: gathered along a tree, told by one key."""

import json
from datetime import timedelta
from typing import Any

from torch import distributed as dist

FAN_OUT = 16  # ranks whose values one rank brings together
PATIENCE = timedelta(days=30)  # lost ranks are the watchdog's concern


class StoreTree:
    """One rank's place in a tree over a store; no rank waits for more than FAN_OUT keys."""

    def __init__(self, store: dist.Store, rank: int, ranks: int):
        self.store, self.rank, self.ranks = store, rank, ranks

    def gather(self, name: str, value: Any) -> dict[int, Any]:
        """Return every rank's JSON-serialisable value by rank, on rank 0; elsewhere nothing.

        Blocks until the ranks below this one have called it. `name` is used once.
        """
        found = {str(self.rank): value}
        first = self.rank * FAN_OUT + 1
        below = [f"{name}/{r}" for r in range(first, min(first + FAN_OUT, self.ranks))]
        if below:
            self.store.wait(below, PATIENCE)
            for raw in self.store.multi_get(below):
                found |= json.loads(raw)
            for key in below:
                self.store.delete_key(key)
        if self.rank:
            self.store.set(f"{name}/{self.rank}", json.dumps(found))
            return {}
        return {int(rank): theirs for rank, theirs in found.items()}

    def tell(self, name: str, value: Any) -> None:
        """Tell a JSON-serialisable value to all ranks that `hear` this name."""
        self.store.set(name, json.dumps(value))

    def hear(self, name: str) -> Any:
        """Return the value of a name; blocks until it is told."""
        self.store.wait([name], PATIENCE)
        return json.loads(self.store.get(name))
