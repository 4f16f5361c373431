"""Steps of the engine: one token of every answer, or one chunk of some prompts. What fails is found by halving.

A step that fails is taken back and tried again in halves, so one bad work costs its neighbours a moment and nothing
else. Where memory ran out, the smaller number of rows stays the limit for a while.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.errors import MnemicError
from ..hosts.attach import base_model
from ..hosts.host import MemoryHost
from .errors import OutOfMemory, ServingError, StepFailed
from .rows import Batch, Job, Undo, left_padded, packed

# Steps without running out of memory until twice as many rows are tried again.
_PATIENCE = 256

Failed = Callable[[Job, ServingError], None]


class Steps:
    """Runs the model. `failed` is told of each job that fails; no other notices.

    Args:
        rows: the most rows of one step. Memories that read one row at a time get one.
    """

    def __init__(self, model: Any, rows: int, failed: Failed):
        self.base: MemoryHost = base_model(model)
        self.most = rows if self.base.memory.batch_safe else 1
        self.cap, self.clean = self.most, 0
        self.failed = failed

    def join(self, batches: list[Batch]) -> list[Batch]:
        """As few batches of at most `cap` rows as go together in this order."""
        groups: list[list[Batch]] = []
        for batch in batches:
            if groups and sum(map(len, groups[-1])) + len(batch) <= self.cap:
                groups[-1].append(batch)
            else:
                groups.append([batch])
        joined: list[Batch] = []
        for group in groups:
            try:
                joined += [Batch.cat(group)] if len(group) > 1 else group
            except Exception as error:
                if not out_of_memory(error):
                    raise
                # Apart they are in memory already.
                self._shrink(max(map(len, group)))
                joined += group
        return joined

    def decode(self, batches: Sequence[Batch]) -> list[Batch]:
        """Every row reads its pending token. Returns the batches that did."""
        done: list[Batch] = []
        todo = list(reversed(batches))
        while todo:
            batch = todo.pop()
            if len(batch.jobs) > self.cap:
                todo += reversed(self._split(batch))
                continue
            undo = Undo(batch.cache)
            try:
                pending = [[0 if job is None else job.pending] for job in batch.jobs]
                ids = torch.tensor(pending, device=self.base.device)
                self.base(ids, past_key_values=batch.cache, logits_to_keep=1)
                done.append(batch)
            except Exception as error:
                self._note(error, len(batch.jobs))
                if len(batch) == 1 or not undo.usable:
                    self._fail([job for _, job in batch.live], error)
                    continue
                undo.run()
                todo += reversed(self._split(batch))
        self._rest()
        return done

    def prefill(self, jobs: Sequence[Job], counts: Sequence[int]) -> list[Job]:
        """Every job reads so many of its unread tokens. Returns the jobs that did."""
        done: list[Job] = []
        todo = [list(zip(jobs, counts, strict=True))]
        while todo:
            part = todo.pop()
            if len(part) > self.cap:
                todo += [part[self.cap :], part[: self.cap]]
                continue
            try:
                ids, mask = left_padded([job.unread[:count] for job, count in part])
                shared = packed([job for job, _ in part], self.base)
                self.base(ids.to(self.base.device), attention_mask=mask, past_key_values=shared, logits_to_keep=1)
                caches = [shared] if len(part) == 1 else [shared.select([i]) for i in range(len(part))]
            except Exception as error:
                self._note(error, len(part))
                if len(part) == 1:
                    self._fail([part[0][0]], error)
                    continue
                middle = (len(part) + 1) // 2
                todo += [part[middle:], part[:middle]]
                continue
            for (job, count), cache in zip(part, caches, strict=True):
                job.cache = cache
                job.has_read(count)
                done.append(job)
        self._rest()
        return done

    def _split(self, batch: Batch) -> tuple[Batch, ...]:
        try:
            if len(batch) > self.cap or len(batch) == len(batch.jobs):
                return batch.halves()
            batch.compact()
            return (batch,)
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._fail([job for _, job in batch.live], error)
            return ()

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        for job in jobs:
            self.failed(job, as_serving_error(error))

    def _note(self, error: Exception, rows: int) -> None:
        if out_of_memory(error):
            self._shrink(max(1, rows // 2))

    def _shrink(self, rows: int) -> None:
        self.cap, self.clean = min(self.cap, rows), 0
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _rest(self) -> None:
        self.clean += 1
        if self.clean > _PATIENCE and self.cap < self.most:
            self.cap, self.clean = min(self.most, 2 * self.cap), 0


def as_serving_error(error: BaseException) -> ServingError:
    """What the client is told. Messages of foreign errors stay inside: they may quote anything."""
    if isinstance(error, ServingError):
        return error
    if out_of_memory(error):
        return OutOfMemory("The model ran out of memory on this request. Send less at once, or try again later.")
    detail = str(error) if isinstance(error, MnemicError) else type(error).__name__
    failure = StepFailed(f"The model failed on this request ({detail}); the session is as it was before.")
    failure.__cause__ = error
    return failure


def out_of_memory(error: BaseException) -> bool:
    # The CPU's allocator raises a bare RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
