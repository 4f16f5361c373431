"""Rows: works on their way, and the caches that some of them share while a step reads them together."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hosts.cache import MemoryCache
from ..hosts.host import MemoryHost
from ..hosts.stream import Stream
from .errors import ServingError
from .requests import Finished, Progress, Token, Usage, Work
from .sampling import Logs, Sampler
from .text import AnswerText


class Job:
    """One work on its way.

    unread: ids still to be read, (n,). cache: one row, while it reads its prompt; None while it waits or shares a
    batch. pending: the token chosen last, not read yet. reason: why it ends, once it does. until: deadline on the
    monotonic clock. cancelled: set by the client's side at any time. failed: it has told its client.
    """

    def __init__(self, work: Work, prompt: Tensor, tokenizer: Any, seconds: float | None, emit: Callable[..., None]):
        self.work, self.unread, self.total = work, prompt, len(prompt)
        self.tenant = work.tenant
        self.until = None if seconds is None else time.monotonic() + seconds
        self.emit = emit
        self.sampler = Sampler(work.sampling)
        self.text = AnswerText(tokenizer, work.sampling.stop)
        self.cache: MemoryCache | None = None
        self.pending: int | None = None
        self.reason: Any = None if work.sampling.max_tokens else "read"
        self.made = self.read = 0
        self.cancelled = self.failed = False

    @property
    def late(self) -> bool:
        return self.until is not None and time.monotonic() > self.until

    def begin(self, model: Any) -> None:
        """Take a copy of the stream to go on from: whatever happens here, the client's own stays as it is."""
        self.cache = Stream(model).cache if self.work.stream is None else self.work.stream.cache.fork()

    def has_read(self, count: int) -> None:
        self.unread = self.unread[count:]
        self.read += count
        if self.pending is None and self.made == 0:
            self.emit(Progress(self.read, self.total))

    def take(self, token: int, ends: frozenset[int], logs: Logs | None) -> None:
        """The next token of the answer."""
        params = self.work.sampling
        self.made += 1
        self.sampler.made[token] += 1
        if token in ends:
            self.reason = "end"
        elif self.made >= params.max_tokens:
            self.reason = "length"
        piece = self.text.add(token, self.reason is not None)
        if self.text.stop is not None:
            self.reason = "stop"
        self.pending = token
        closing = list(self.work.closing)
        if self.reason is not None and closing:
            # Read like a prompt, with the answer's last token in front.
            self.unread = torch.tensor([token, *closing[closing[0] == token :]])
            self.pending = None
        self.emit(Token(token, piece) if logs is None else Token(token, piece, *logs))

    def fail(self, error: ServingError) -> None:
        self.cache, self.failed = None, True
        self.emit(error)

    def finish(self, model: Any, cache: MemoryCache) -> None:
        stream = Stream(model)
        stream.cache = cache
        before = int(self.work.stream.cache.seen[0]) if self.work.stream is not None else 0
        self.emit(Finished(self.reason, Usage(self.total, self.made, before), stream, self.text.stop))


class Batch:
    """Jobs that make their answers side by side, and the cache that they share; row i of it is `jobs[i]`'s.

    A row whose job has left is None, takes no tokens, and waits for the next job: to copy one row is cheap, to copy all
    of them costs as much as a step. `len` counts jobs.
    """

    def __init__(self, jobs: Sequence[Job | None], cache: MemoryCache):
        self.jobs: list[Job | None] = list(jobs)
        self.cache = cache

    def __len__(self) -> int:
        return sum(job is not None for job in self.jobs)

    @property
    def live(self) -> list[tuple[int, Job]]:
        """Rows with a job, and it."""
        return [(i, job) for i, job in enumerate(self.jobs) if job is not None]

    @staticmethod
    def of(job: Job) -> "Batch":
        assert job.cache is not None
        batch = Batch([job], job.cache)
        job.cache = None
        return batch

    @staticmethod
    def cat(batches: Sequence["Batch"]) -> "Batch":
        """The first batch with the others' jobs, in its free rows if they are enough; what fails changes nothing."""
        first, *others = batches
        for batch in others:
            batch.compact()
        coming = [job for batch in others for job in batch.jobs]
        cache = others[0].cache if len(others) == 1 else MemoryCache.cat([batch.cache for batch in others])
        free = [i for i, job in enumerate(first.jobs) if job is None][: len(coming)]
        if len(free) == len(coming) and put_rows(first.cache, free, cache):
            for i, job in zip(free, coming, strict=True):
                first.jobs[i] = job
            return first
        first.compact()
        return Batch([*first.jobs, *coming], MemoryCache.cat([first.cache, cache]))

    def row(self, i: int) -> MemoryCache:
        """A copy of one row."""
        return self.cache.select([i])

    def leave(self, rows: Sequence[int]) -> None:
        for i in rows:
            self.jobs[i] = None
        self.cache.finished = torch.tensor([job is None for job in self.jobs])

    def compact(self) -> None:
        """Give up the free rows."""
        live = self.live
        if 0 < len(live) < len(self.jobs):
            self.cache = self.cache.select([i for i, _ in live])
            self.jobs = [job for _, job in live]

    def halves(self) -> tuple["Batch", "Batch"]:
        live = self.live
        middle = (len(live) + 1) // 2
        first, second = (
            Batch([job for _, job in part], self.cache.select([i for i, _ in part]))
            for part in (live[:middle], live[middle:])
        )
        return first, second


def put_rows(cache: MemoryCache, rows: Sequence[int], other: MemoryCache) -> bool:
    """Replace rows of a cache by those of another one, in place. False, and no change, where they do not fit."""
    assert cache.state is not None
    assert other.state is not None
    held = {name: t.shape[1:] for name, t in cache.buffers.items()}
    if held != {name: t.shape[1:] for name, t in other.buffers.items()}:
        return False
    index = torch.tensor(rows)
    mine, theirs = _parts(cache), _parts(other)
    # What the other lacks, its rows do not see.
    if not theirs.keys() <= mine.keys():
        return False
    # The state is a value; the only copy, and so the only thing that may fail, comes first.
    cache.state = cache.state.put(index, other.state)
    cache.reads = None
    for name in ("open", "seen", "finished"):
        setattr(cache, name, getattr(cache, name).index_copy(0, index, getattr(other, name)))
    for name, tensor in theirs.items():
        mine[name][index.to(tensor.device)] = tensor
    return True


def _parts(cache: MemoryCache) -> dict[tuple[Any, ...], Tensor]:
    """What a cache changes in place, by name."""
    found: dict[tuple[Any, ...], Tensor] = {("features", name): t for name, t in cache.features.items()}
    found |= {("buffers", name): t for name, t in cache.buffers.items()}
    found |= {("trace", i, name): t for i, trace in cache.trace.items() for name, t in trace.items()}
    for i, kv in cache.keys_values.items():
        found |= {("keys", i): kv.keys, ("values", i): kv.values}
    if cache.last_logits is not None:
        found["last_logits",] = cache.last_logits
    return found


class Undo:
    """Takes back a failed decode step of a cache.

    States are values, and a token written again goes to the same column, so little needs a copy: buffers, which
    memories change as they like. Keys and values move only when the window of a continuous memory does, behind the
    step's last computation; a failure there cannot be taken back (`usable`).
    """

    def __init__(self, cache: MemoryCache):
        self.cache, self.before = cache, dict(vars(cache))
        self.before["keys_values"], self.before["trace"] = dict(cache.keys_values), dict(cache.trace)
        self.before["features"] = dict(cache.features)
        self.before["buffers"] = {name: t.clone() for name, t in cache.buffers.items()}

    @property
    def usable(self) -> bool:
        return not self.cache.layout.window or self.cache.seen is self.before["seen"]

    def run(self) -> None:
        vars(self.cache).update(self.before)


def packed(jobs: Sequence[Job], base: MemoryHost) -> MemoryCache:
    """The rows of some jobs that read their prompts, copied into one cache."""
    caches = [job.cache for job in jobs if job.cache is not None]
    if len(caches) == 1:
        return caches[0].fork()
    blank = [c for c in caches if c.last_logits is None]
    for cache in blank:
        # Rows are joined with their last logits; those of a row that has read nothing are never looked at.
        cache.last_logits = torch.zeros(1, base.config.vocab_size, dtype=base.dtype, device=base.device)
    try:
        return MemoryCache.cat(caches)
    finally:
        for cache in blank:
            cache.last_logits = None


def left_padded(pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Ids (n, longest), and their mask, None where all are of one length."""
    longest = max(map(len, pieces))
    if all(len(p) == longest for p in pieces):
        return torch.stack(list(pieces)), None
    ids = torch.zeros(len(pieces), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, piece in enumerate(pieces):
        ids[i, longest - len(piece) :] = piece
        mask[i, longest - len(piece) :] = 1
    return ids, mask


def last_logits(caches: Sequence[MemoryCache]) -> Tensor:
    return torch.cat([c.last_logits for c in caches if c.last_logits is not None])
