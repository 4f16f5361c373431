"""Continuous batching: works of many clients share each step of one model.

One thread owns the model. A turn of its loop is one step of decoding, in which every answer grows by a token, and then
at most one step of reading prompts, in chunks: so an answer never waits longer than one such chunk, however long the
documents that others feed. Works join and leave between steps.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..core.errors import UnsupportedError
from ..hosts.anatomy import token_embeddings
from ..hosts.attach import base_model
from ..hosts.host import MemoryHost
from .answers import Answer, Outbox
from .checks import check_work
from .errors import DeadlineExceeded, Overloaded, ServingError, ShuttingDown
from .requests import Limits, Work
from .rows import Job
from .schedule import Schedule
from .steps import as_serving_error
from .waiting import Waiting

_SPEED_DECAY = 0.95
_LONGEST_RETRY = 300.0


@dataclass(frozen=True)
class StepRecord:
    """One step. tokens: read by it; seconds: with everything around it, choosing tokens included."""

    kind: Literal["decode", "prefill"]
    rows: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Stats:
    """Now: waiting works and their prompt tokens, rows reading prompts and making answers, tokens read a second
    lately. Since the start: steps of each kind, tokens read and made, works finished, failed and cancelled."""

    waiting: int
    waiting_tokens: int
    prefilling: int
    decoding: int
    tokens_per_second: float
    decode_steps: int
    prefill_steps: int
    tokens_read: int
    tokens_made: int
    finished: int
    failed: int
    cancelled: int


class Engine:
    """Runs works on an attached model.

    Args:
        model: goes into eval mode, and belongs to the engine from `start` to `stop`.
        tokenizer: for the text of answers; without one there are ids alone, and no stop strings.
        observe: called after each step, in the engine's thread.

    Raises:
        UnsupportedError: a memory that cannot decode token by token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        limits: Limits | None = None,
        *,
        observe: Callable[[StepRecord], object] | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.limits = limits or Limits()
        self.base: MemoryHost = base_model(model)
        if self.base.memory.whole_segments:
            raise UnsupportedError(
                f"The memory {self.base.memory.name!r} reads whole segments and cannot decode token by token, so it "
                "cannot be served. Choose another memory or preset."
            )
        self.vocabulary = token_embeddings(self.base).shape[0]
        self._observe = observe
        self._schedule = Schedule(model, self.limits)
        self._outbox = Outbox()
        self._wake = threading.Condition()
        self._waiting: Waiting[Job] = Waiting()
        self._waiting_tokens = 0
        self._thread: threading.Thread | None = None
        self._ending: Literal["no", "drain", "now"] = "no"
        self._speed = 0.0
        self._counts: Counter[str] = Counter()

    # The clients' side

    def start(self) -> "Engine":
        model: Any = self.model
        model.eval()
        self._thread = threading.Thread(target=self._run, name="mnemic-engine", daemon=True)
        self._thread.start()
        return self

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and self._ending == "no"

    async def stop(self, drain: bool = True) -> None:
        """Take no more works; finish those that are here, or with drain=False fail them (`ShuttingDown`)."""
        with self._wake:
            self._ending = "drain" if drain and self._ending != "now" else "now"
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def submit(self, work: Work) -> Answer:
        """Put a work in the queue; call it in a running event loop. The answer iterates over its events.

        Raises:
            InvalidRequest, TooLarge: a work that cannot be done. Overloaded: the queue is full. ShuttingDown: the
                engine does not run. While iterating: StepFailed, OutOfMemory, DeadlineExceeded, ShuttingDown.
        """
        prompt = check_work(work, self.base, self.vocabulary, self.limits, self.tokenizer)
        answer = Answer(asyncio.get_running_loop())
        seconds = self.limits.deadline if work.deadline is None else work.deadline
        job = Job(work, prompt, self.tokenizer, seconds, lambda event: self._outbox.put(answer, event))
        answer.job = job
        with self._wake:
            if not self.running:
                raise ShuttingDown("The server takes no more requests at the moment.")
            limits = self.limits
            tokens = self._waiting_tokens + job.total
            if len(self._waiting) >= limits.max_waiting or (len(self._waiting) and tokens > limits.max_waiting_tokens):
                raise Overloaded(
                    f"{len(self._waiting)} requests with {self._waiting_tokens:,} tokens are waiting; try again later.",
                    retry_after=self._retry_after(),
                )
            self._waiting.put(job)
            self._waiting_tokens = tokens
            self._wake.notify()
        return answer

    def stats(self) -> Stats:
        schedule, counts = self._schedule, self._counts
        with self._wake:
            waiting, waiting_tokens = len(self._waiting), self._waiting_tokens
        return Stats(
            waiting=waiting,
            waiting_tokens=waiting_tokens,
            prefilling=len(schedule.reading),
            decoding=schedule.rows - len(schedule.reading),
            tokens_per_second=self._speed,
            decode_steps=counts["decode"],
            prefill_steps=counts["prefill"],
            tokens_read=counts["read"],
            tokens_made=schedule.counts["tokens_made"],
            finished=schedule.counts["finished"],
            failed=schedule.counts["failed"],
            cancelled=counts["cancelled"],
        )

    def _retry_after(self) -> float:
        return min(_LONGEST_RETRY, self._waiting_tokens / self._speed) if self._speed else 1.0

    # The engine's thread

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._ending == "no" and not self._busy:
                    self._wake.wait()
                if self._ending == "now" or not self._busy:
                    break
            try:
                self._turn()
            except Exception as error:
                # Nothing that one work does gets here; without knowing whose fault it is, none can go on.
                self._drop_all(as_serving_error(error))
            self._outbox.send()
        self._drop_all(ShuttingDown("The server is shutting down."))
        self._outbox.send()

    @property
    def _busy(self) -> bool:
        return bool(len(self._waiting) or self._schedule.rows)

    def _turn(self) -> None:
        schedule = self._schedule
        with torch.no_grad():
            self._sweep()
            self._admit()
            if schedule.batches:
                self._timed("decode", schedule.decode)
                # Tokens are out before the prompts' turn.
                self._outbox.send()
            if schedule.reading:
                self._timed("prefill", schedule.prefill)

    def _timed(self, kind: Literal["decode", "prefill"], step: Callable[[], tuple[int, int]]) -> None:
        began = time.perf_counter()
        rows, tokens = step()
        seconds = time.perf_counter() - began
        self._counts[kind] += 1
        self._counts["read"] += tokens
        rate = tokens / max(seconds, 1e-9)
        self._speed = rate if not self._speed else _SPEED_DECAY * self._speed + (1 - _SPEED_DECAY) * rate
        if self._observe is not None:
            self._observe(StepRecord(kind, rows, tokens, seconds))

    def _sweep(self) -> None:
        """Drop works whose client has left or whose time is up."""
        with self._wake:
            dropped = self._waiting.sift(_goes_on)
            self._waiting_tokens -= sum(job.total for job in dropped)
        for job in (*dropped, *self._schedule.remove(_goes_on)):
            if job.cancelled:
                job.cache = None
                self._counts["cancelled"] += 1
            else:
                late = DeadlineExceeded("The request took longer than it may; the session is as it was before.")
                self._schedule.fail(job, late)

    def _admit(self) -> None:
        while self._schedule.rows < self.limits.max_rows:
            with self._wake:
                if not len(self._waiting):
                    break
                job = self._waiting.take()
                self._waiting_tokens -= job.total
            self._schedule.admit(job)

    def _drop_all(self, error: ServingError) -> None:
        with self._wake:
            jobs = self._waiting.sift(lambda job: False)
            self._waiting_tokens = 0
        for job in (*jobs, *self._schedule.remove(lambda job: False)):
            self._schedule.fail(job, error)


def _goes_on(job: Job) -> bool:
    return not job.cancelled and not job.late
