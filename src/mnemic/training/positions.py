"""Positions: endless samples that can be gone on with after the first n, without making those again."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from ..core.errors import ConfigError, DataError


class Positioned(IterableDataset):
    """Endless samples that depend on a seed alone. The position is the number of samples given out.

    Subclasses say what is drawn (`_draws`, cheap), what sample that is (`_example`), and what decides both
    (`_content`). Trainers use `state_dict` and `load_state_dict`; a loader that reads ahead has been given more than
    was trained on, so load {**state, "samples": n} to go on after the first n.
    """

    samples = _first = 0
    _known: str | None = None

    def _draws(self) -> Iterator[Any]:
        raise TypeError(f"{type(self).__name__} must say what is drawn.")

    def _example(self, drawn: Any) -> Any:
        raise TypeError(f"{type(self).__name__} must say which sample was drawn.")

    def _content(self) -> Iterator[Any]:
        """Everything that decides the samples: texts, token ids, settings."""
        raise TypeError(f"{type(self).__name__} must say what decides its samples.")

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ConfigError(
                f"{worker.num_workers} data-loader workers would each give out the same samples; set "
                "dataloader_num_workers to 0 or 1."
            )
        self.samples = self._first
        for drawn in islice(self._draws(), self._first, None):
            # Before it is handed over: the position is that of the next one.
            self.samples += 1
            yield self._example(drawn)

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the samples."""
        if self._known is None:
            found = hashlib.sha256(type(self).__name__.encode())
            for part in self._content():
                content = repr(part).encode()
                found.update(f"{len(content)}|".encode() + content)
            self._known = found.hexdigest()
        return self._known

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "data": self.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a position: iterators begin there from now on.

        Raises:
            DataError: the position is one in other data, or with other settings.
        """
        if state["data"] != self.fingerprint():
            raise DataError(
                "The saved position is one in other data: texts, sizes or seed have changed. Resume with the data of "
                "the saved run, or start a new run."
            )
        self.samples = self._first = int(state["samples"])
