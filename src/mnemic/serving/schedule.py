"""Which rows read what: answers and prompts on their way, from admission to their end."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..hosts.attach import base_model
from ..hosts.host import MemoryHost
from .errors import ServingError, StepFailed
from .requests import Limits
from .rows import Batch, Job, last_logits
from .sampling import Logs, choose, log_probabilities
from .steps import Steps, as_serving_error, out_of_memory

_CHUNK = 512
_FULL = 0.75


class Schedule:
    """The rows in work. One thread uses it.

    reading: works that read prompts, in the order of their turns; batches: works that make answers. counts:
    tokens_made, finished, failed.
    """

    def __init__(self, model: Any, limits: Limits):
        self.model, self.limits = model, limits
        self.base: MemoryHost = base_model(model)
        ends = self.base.generation_config.eos_token_id
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        self.steps = Steps(model, limits.max_rows, self.fail)
        self.reading: deque[Job] = deque()
        self.batches: list[Batch] = []
        self.counts: Counter[str] = Counter()

    @property
    def rows(self) -> int:
        return len(self.reading) + sum(map(len, self.batches))

    def admit(self, job: Job) -> None:
        try:
            job.begin(self.model)
        except Exception as error:
            self.fail(job, as_serving_error(error))
            return
        if len(job.unread):
            self.reading.append(job)
        else:
            self._go_on([job])

    def remove(self, goes_on: Callable[[Job], bool]) -> list[Job]:
        """Take out the works that do not go on."""
        removed = [job for job in self.reading if not goes_on(job)]
        if removed:
            self.reading = deque(job for job in self.reading if job not in removed)
        for batch in self.batches:
            gone = [(i, job) for i, job in batch.live if not goes_on(job)]
            removed += [job for _, job in gone]
            self._leave(batch, [i for i, _ in gone])
        self.batches = [batch for batch in self.batches if len(batch)]
        return removed

    def decode(self) -> tuple[int, int]:
        """Every answer grows by a token. Returns rows and tokens read."""
        self.batches = self.steps.join(self.batches)
        self.batches = self.steps.decode(self.batches)
        rows = sum(map(len, self.batches))
        for batch in self.batches:
            ended = [(i, job) for i, job in batch.live if job.reason is not None]
            for i, job in ended:
                self._finish(job, lambda i=i, batch=batch: batch.row(i))
            going = [(i, job) for i, job in batch.live if job.reason is None]
            gone = [i for i, _ in ended]
            if going:
                assert batch.cache.last_logits is not None
                places = [i for i, _ in going]
                logits = batch.cache.last_logits
                logits = logits if len(places) == len(logits) else logits[places]
                for i in self._choose([job for _, job in going], logits):
                    place, job = going[i]
                    self._close(job, lambda i=place, batch=batch: batch.row(i))
                    gone.append(place)
            self._leave(batch, gone)
        self.batches = [batch for batch in self.batches if len(batch)]
        return rows, rows

    def prefill(self) -> tuple[int, int]:
        """The next prompts in turn read a chunk each. Returns rows and tokens read."""
        jobs: list[Job] = []
        counts: list[int] = []
        while self.reading and len(jobs) < self.steps.cap:
            count = self._chunk(self.reading[0])
            if jobs and max(*counts, count) * (len(jobs) + 1) > self.limits.prefill_tokens:
                break
            jobs.append(self.reading.popleft())
            counts.append(count)
        ready: list[Job] = []
        for job in self.steps.prefill(jobs, counts):
            if len(job.unread):
                self.reading.append(job)
            elif job.reason is not None:
                self._finish(job, lambda job=job: job.cache)
            else:
                ready.append(job)
        self._go_on(ready)
        return len(jobs), sum(counts)

    def _chunk(self, job: Job) -> int:
        """Tokens that a row reads next: up to a border of its segment where it gets to one, for steps without masks."""
        segment = self.base.mnemic.layout.segment
        # A step reads segments one after another, so answers wait for one only.
        whole = segment if self.batches and segment < _CHUNK else segment * (_CHUNK // segment) or _CHUNK
        most = min(self.limits.prefill_chunk or whole, self.limits.prefill_tokens)
        assert job.cache is not None
        opened = int(job.cache.open[0])
        border = (opened + most) // segment * segment
        return min(len(job.unread), (border if border > opened else opened + most) - opened)

    def _go_on(self, jobs: list[Job]) -> None:
        """Works that have read their prompt choose a token and join the answers."""
        if not jobs:
            return
        try:
            leaving = self._choose(jobs, last_logits([job.cache for job in jobs if job.cache is not None]))
        except Exception as error:
            for job in jobs:
                self.fail(job, as_serving_error(error))
            return
        for i, job in enumerate(jobs):
            if i in leaving:
                self._close(job, lambda job=job: job.cache)
            else:
                self.batches.append(Batch.of(job))

    def _choose(self, jobs: Sequence[Job], logits: Tensor) -> set[int]:
        """The next token of each job, from logits (n, V). Returns the places of those that make no more."""
        bad = logits.isnan().any(-1).tolist()
        chosen = self._chosen(jobs, logits, [job.sampler.uniform() for job in jobs])
        leaving: set[int] = set()
        for i, job in enumerate(jobs):
            if bad[i] and not job.failed:
                self.fail(job, StepFailed("The model's output is not a number; the session is as it was before."))
            if not job.failed:
                self._take(job, *chosen[i])
            if job.pending is None or job.failed:
                leaving.add(i)
        return leaving

    def _take(self, job: Job, token: int, logs: Logs | None) -> None:
        try:
            job.take(token, self.ends, logs)
        except Exception as error:
            # A tokenizer may fail on a token.
            self.fail(job, as_serving_error(error))
            return
        self.counts["tokens_made"] += 1

    def _chosen(self, jobs: Sequence[Job], logits: Tensor, uniform: Sequence[float]) -> list[tuple[int, Logs | None]]:
        """Token and log-probabilities of each job; where that fails, of one at a time."""
        try:
            tokens = choose(logits, [job.sampler for job in jobs], uniform)
            logs = log_probabilities(logits, tokens, [job.work.sampling.logprobs for job in jobs])
        except Exception as error:
            if len(jobs) > 1:
                each = (self._chosen([job], logits[i : i + 1], [uniform[i]]) for i, job in enumerate(jobs))
                return [one for found in each for one in found]
            self.fail(jobs[0], as_serving_error(error))
            return [(0, None)]
        return list(zip(tokens, logs, strict=True))

    def _leave(self, batch: Batch, rows: Sequence[int]) -> None:
        """Free rows of a batch. A step reads free rows too, so not too many are kept."""
        if not rows:
            return
        batch.leave(rows)
        if len(batch) < _FULL * len(batch.jobs):
            try:
                batch.compact()
            except Exception as error:
                if not out_of_memory(error):
                    raise

    def _close(self, job: Job, row: Callable[[], Any]) -> None:
        """A work that has made its answer reads what closes it, before longer prompts have their turn."""
        if job.failed:
            return
        try:
            job.cache = row()
        except Exception as error:
            self.fail(job, as_serving_error(error))
            return
        self.reading.appendleft(job)

    def _finish(self, job: Job, row: Callable[[], Any]) -> None:
        try:
            job.finish(self.model, row())
        except Exception as error:
            self.fail(job, as_serving_error(error))
            return
        job.cache = None
        self.counts["finished"] += 1

    def fail(self, job: Job, error: ServingError) -> None:
        if job.failed:
            return
        job.fail(error)
        self.counts["failed"] += 1
