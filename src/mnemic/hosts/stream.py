"""Stream: one running sequence (or a batch of them) at constant memory; what a session saves."""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import StoppingCriteriaList, TextIteratorStreamer

from ..core.errors import FileFormatError, InputError
from ..core.files import MAX_BYTES, from_bytes, read_file, to_bytes, write_file
from ..core.state import Rows, State
from .attach import base_model
from .cache import KeyValues, MemoryCache
from .host import MemoryHost
from .reading import Ids, Inputs, Text
from .saving import check_owner, identity_of

_SEGMENTS_PER_CALL = 16


class Stream(Inputs):
    """Feed tokens of any length, generate at any point, save and resume.

    Args:
        model: an attached model. batch_size: rows read side by side; they need not be in step.
        tokenizer: for text; ids need none. By default the host's own, where it has a name.
    """

    _kind = "stream"

    def __init__(self, model: Any, batch_size: int = 1, *, tokenizer: Any = None):
        if batch_size < 1:
            raise InputError(f"A stream has at least one row; got batch_size={batch_size}.")
        self.model = model
        self.base: MemoryHost = base_model(model)
        self.batch_size = batch_size
        self._tokenizer = tokenizer
        self.cache = self._new_cache()

    @property
    def tokens_seen(self) -> int | list[int]:
        """Tokens read so far; a list for a batch."""
        seen = self.cache.seen.tolist()
        return seen[0] if self.batch_size == 1 else seen

    @property
    def state_bytes(self) -> int:
        """Bytes carried from call to call: state, open segment, last logits."""
        return self.cache.nbytes

    @property
    def state(self) -> State:
        """The memory's state, as of the last commit."""
        assert self.cache.state is not None
        return self.cache.state

    # Reading

    def feed(
        self,
        inputs: Text | Ids | Iterable[Text | Ids],
        *,
        attention_mask: Tensor | None = None,
        return_logits: bool = False,
        progress: bool = False,
    ) -> Any:
        """Read text, ids, or an iterator of either.

        Args:
            inputs: one row: a string, a list of ids, or a tensor (Q,) or (1, Q); several rows: a list of strings or
                of lists of ids (any lengths), or a tensor (B, Q) with `attention_mask`.
            return_logits: return the logits of every column given, (B, Q, V) on the CPU; otherwise the stream.
            progress: show a progress bar on stderr.

        Raises:
            InputError: empty input, wrong shapes, ids outside the vocabulary, or text without a tokenizer.
        """
        pieces = inputs if isinstance(inputs, Iterator) else iter([inputs])
        kept: list[Tensor] = []
        columns = (
            TextColumn("{task.completed:,} tokens"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
        )
        count = 0
        with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar, torch.no_grad():
            task = bar.add_task("", total=None, speed=0)
            for piece in pieces:
                ids, mask = self._encode(piece, attention_mask)
                for part, part_mask in self._parts(ids, mask):
                    part_mask = None if part_mask is None or bool(part_mask.all()) else part_mask
                    if part_mask is not None and not bool(part_mask.any()):
                        if return_logits:
                            kept.append(torch.zeros(*part.shape, self.base.config.vocab_size))
                        continue
                    output = self.base(
                        part.to(self.base.device),
                        attention_mask=part_mask,
                        past_key_values=self.cache,
                        logits_to_keep=0 if return_logits else 1,
                    )
                    if return_logits:
                        kept.append(output.logits.cpu())
                    count += part.shape[1]
                    elapsed = bar.tasks[0].elapsed or 0
                    bar.update(task, completed=count, speed=count / elapsed if elapsed else 0)
        if not count:
            raise InputError("Nothing to feed: the iterator was empty; expected text or token ids.")
        return torch.cat(kept, dim=1) if return_logits else self

    def generate(self, prompt: Text | Ids | None = None, *, return_ids: bool = False, **options: Any) -> Any:
        """Continue the stream; it has then read the prompt and what it generated.

        Args:
            prompt: read first; None to go on from what was fed.
            return_ids: new token ids, a list for each row, instead of text.
            options: everything that the host's `generate()` takes (sampling, beams, stopping, streamer, ...).

        Returns: the generated text (or ids); a list for a batch.

        Raises:
            InputError: no prompt and nothing fed. UnsupportedError: decoding modes that take tokens back.
        """
        ids, mask = self._prompt(prompt)
        # Before anything is read: a stream without a tokenizer cannot hand out text.
        tokenizer = None if return_ids else self.tokenizer
        copies = max(self._option(options, "num_beams"), self._option(options, "num_return_sequences"))
        work = self.cache if copies == 1 else self.cache.fork()
        replay = prompt is None
        work.columns_given, work.replay = 0, replay
        if copies > 1 and work.started:
            work.batch_repeat_interleave(copies)
        before = work.seen if work.started else torch.zeros(self.batch_size, dtype=torch.long)
        read = torch.zeros_like(mask.sum(1)) if replay else mask.sum(1)
        try:
            with torch.no_grad():
                output = self.model.generate(
                    input_ids=ids.to(self.base.device),
                    attention_mask=mask.to(self.base.device),
                    past_key_values=work,
                    **options,
                )
        finally:
            work.replay, work.finished = False, torch.zeros_like(work.finished)
        sequences = output if isinstance(output, Tensor) else output.sequences
        new = sequences[:, ids.shape[1] :].cpu()
        if copies == 1:
            # The last token of each row was chosen but not read yet; an ended row read nothing after its end.
            lengths = (work.seen - before - read.cpu() + 1).clamp_max(new.shape[1])
            rows = [row[:n].tolist() for row, n in zip(new, lengths.tolist(), strict=True)]
            self.feed([row[-1:] for row in rows])
        else:
            rows = [self._trim(row) for row in new]
            each = len(rows) // self.batch_size
            if not replay:
                self.feed(ids, attention_mask=mask)
            self.feed(rows[::each])
        results = rows if tokenizer is None else tokenizer.batch_decode(rows, skip_special_tokens=True)
        return results[0] if len(results) == 1 else results

    def iterate(self, prompt: Text | None = None, **options: Any) -> Iterator[str]:
        """`generate`, yielding pieces of text as they come (one row)."""
        if self.batch_size > 1:
            raise InputError("Pieces of text can be followed for one row; generate a batch with generate().")
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []
        left = threading.Event()

        def stop(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((input_ids.shape[0],), left.is_set(), device=input_ids.device)

        criteria = StoppingCriteriaList([*(options.pop("stopping_criteria", None) or ()), stop])

        def run() -> None:
            try:
                self.generate(prompt, streamer=streamer, return_ids=True, stopping_criteria=criteria, **options)
            except BaseException as error:
                failure.append(error)
                streamer.end()

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            # A caller that leaves early gets a stream that nobody writes to any more.
            left.set()
            worker.join()
        if failure:
            raise failure[0]

    # Keeping

    def fork(self) -> "Stream":
        """An independent stream that has read the same."""
        return self._with(self.cache.fork(), self.batch_size)

    def select(self, rows: Rows) -> "Stream":
        """A stream of copies of the given rows."""
        cache = self.cache.select(rows)
        return self._with(cache, cache.batch_size)

    @staticmethod
    def cat(streams: Sequence["Stream"]) -> "Stream":
        """One batch of streams of the same model; each row goes on where it stood."""
        if not streams or any(s.base is not streams[0].base for s in streams):
            raise InputError("Join at least one stream, all of one model.")
        cache = MemoryCache.cat([s.cache for s in streams])
        return streams[0]._with(cache, cache.batch_size)

    def reset(self) -> "Stream":
        """Forget everything read."""
        self.cache = self._new_cache()
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write the stream to one file, atomically; see `core.files`.

        Raises:
            InputError: nothing was read yet, or the file cannot be written.
        """
        write_file(path, "stream", self._header(), self._tensors())

    @classmethod
    def load(
        cls, model: Any, path: str | os.PathLike, *, tokenizer: Any = None, max_bytes: int = MAX_BYTES
    ) -> "Stream":
        """Read a stream saved by `save`, from any device or dtype.

        Raises:
            FileFormatError: the file is damaged, foreign, too large or too new.
            StateError: it belongs to another memory, host, or weights.
        """
        header, tensors = read_file(path, "stream", max_bytes=max_bytes)
        return cls._of(model, header, tensors, f"The stream {path}", tokenizer, None)

    def to_bytes(self, *, identity: Mapping[str, Any] | None = None) -> bytes:
        """The content of the file that `save` writes, for stores of one's own.

        Args:
            identity: of the model (`identity_of`), where its weights have not changed since it was taken.

        Raises:
            InputError: nothing was read yet.
        """
        return to_bytes("stream", self._header(identity), self._tensors())

    @classmethod
    def from_bytes(
        cls,
        model: Any,
        data: bytes,
        *,
        tokenizer: Any = None,
        max_bytes: int = MAX_BYTES,
        what: str = "The stream",
        identity: Mapping[str, Any] | None = None,
    ) -> "Stream":
        """Read what `to_bytes` made, or a saved stream's content; `what` names it in errors. Raises as `load`.

        identity: see `to_bytes`.
        """
        header, tensors = from_bytes(data, "stream", what=what, max_bytes=max_bytes)
        return cls._of(model, header, tensors, what, tokenizer, identity)

    # Inside

    @classmethod
    def _of(
        cls,
        model: Any,
        header: dict[str, Any],
        tensors: dict[str, Tensor],
        what: str,
        tokenizer: Any,
        identity: Mapping[str, Any] | None,
    ) -> "Stream":
        base: MemoryHost = base_model(model)
        try:
            check_owner(base, header, what, identity)
            stream = cls(model, len(header["open"]), tokenizer=tokenizer)
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise FileFormatError(f"{what} is incomplete or inconsistent ({error}); restore it from a copy.") from error
        try:
            stream._restore(header, {n: stream._here(n, t) for n, t in tensors.items()})
        except (KeyError, ValueError, IndexError, RuntimeError, TypeError) as error:
            raise FileFormatError(f"{what} is incomplete or inconsistent ({error}); restore it from a copy.") from error
        return stream

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that is saved, by name."""
        cache, layout = self.cache, self.cache.layout
        if cache.last_logits is None:
            raise InputError("This stream has read nothing; there is nothing to save.")
        tensors: dict[str, Tensor] = {f"state/{n}": t for n, t in self.state.items()}
        used = layout.used(int(cache.open.max()))
        if layout.window or int(cache.open.max()):
            for i, kv in cache.keys_values.items():
                tensors[f"keys/{i}"], tensors[f"values/{i}"] = kv.keys[:, :used], kv.values[:, :used]
            tensors.update({f"features/{n}": t[:, :used] for n, t in cache.features.items()})
        if bool((cache.open % layout.every > 0).any()):
            tensors.update({f"trace/{i}/{n}": t for i, trace in cache.trace.items() for n, t in trace.items()})
        tensors.update({f"buffers/{n}": t for n, t in cache.buffers.items()})
        tensors["last_logits"] = cache.last_logits
        return tensors

    def _begins(self) -> bool:
        return not bool(self.cache.seen.any())

    def _new_cache(self) -> MemoryCache:
        cache = MemoryCache(self.base.mnemic.layout)
        with torch.no_grad():
            # Its own storage: training goes on to change a learned first state in place.
            cache.start(self.base.memory.initial_state(self.batch_size).clone(), self.batch_size)
        return cache

    def _header(self, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
        identity = identity_of(self.base) if identity is None else identity
        return {**identity, "open": self.cache.open.tolist(), "seen": self.cache.seen.tolist()}

    def _restore(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        cache, layout, rows = self.cache, self.cache.layout, self.batch_size
        opened, seen = torch.tensor(header["open"]), torch.tensor(header["seen"])
        if opened.shape != (rows,) or seen.shape != (rows,) or opened.dtype != torch.long or seen.dtype != torch.long:
            raise ValueError("counters of the wrong kind")
        if bool((opened < 0).any() | (opened >= layout.segment).any() | (seen < opened).any()):
            raise ValueError("impossible counters")
        state = State({n.removeprefix("state/"): t for n, t in tensors.items() if n.startswith("state/")})
        self.state._check_same(state)
        if state.batch_size not in (None, rows):
            raise ValueError("the state has another number of rows")
        layers = sorted({int(n.split("/")[1]) for n in tensors if n.startswith("keys/")})
        for i in layers:
            keys, values = (self._widened(tensors[f"{kind}/{i}"], layout.columns, rows) for kind in ("keys", "values"))
            cache.keys_values[i] = KeyValues(keys, values)
        for name in (n for n in tensors if n.startswith("features/")):
            cache.features[name.removeprefix("features/")] = self._widened(tensors[name], layout.columns, rows, dim=2)
        for name in (n for n in tensors if n.startswith("buffers/")):
            if tensors[name].shape[0] != rows:
                raise ValueError(f"{name} has another number of rows")
            cache.buffers[name.removeprefix("buffers/")] = tensors[name]
        for name in (n for n in tensors if n.startswith("trace/")):
            _, i, part = name.split("/", 2)
            cache.trace[int(i)] = State({**cache.trace.get(int(i), {}), part: tensors[name]})
        if tensors["last_logits"].shape[0] != rows:
            raise ValueError("last_logits has another number of rows")
        cache.state, cache.open, cache.seen, cache.last_logits = state, opened, seen, tensors["last_logits"]

    @staticmethod
    def _widened(stored: Tensor, columns: int, rows: int, dim: int = 4) -> Tensor:
        if stored.dim() < dim or stored.shape[0] != rows or stored.shape[1] > columns:
            raise ValueError(f"keys, values or features of shape {tuple(stored.shape)}")
        full = stored.new_zeros(rows, columns, *stored.shape[2:])
        full[:, : stored.shape[1]] = stored
        return full

    def _here(self, name: str, tensor: Tensor) -> Tensor:
        """On the model's device, in its dtype; state and buffers in the memory's own (running sums may be float32)."""
        kind, _, part = name.partition("/")
        dtype = self.base.dtype if tensor.is_floating_point() else None
        if kind == "state" and part in self.state:
            dtype = self.state[part].dtype
        elif kind == "buffers":
            dtype = None
        return tensor.to(self.base.device, dtype)

    def _with(self, cache: MemoryCache, batch_size: int) -> "Stream":
        twin = Stream(self.model, batch_size, tokenizer=self._tokenizer)
        twin.cache = cache
        return twin

    def _option(self, options: dict[str, Any], name: str) -> int:
        config = options.get("generation_config") or self.base.generation_config
        value = options.get(name, getattr(config, name, None))
        return 1 if value is None else int(value)

    def _trim(self, row: Tensor) -> list[int]:
        """A row of beam search, up to and including its first end token."""
        ends = self.base.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        ids = row.tolist()
        return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)

    def _prompt(self, prompt: Text | Ids | None) -> tuple[Tensor, Tensor]:
        if prompt is not None:
            return self._encode(prompt, None)
        if self.cache.last_logits is None:
            raise InputError("Nothing to continue: feed the stream first, or give a prompt.")
        # generate() wants at least one column; the logits it needs are kept, so its content does not matter.
        ids = torch.zeros(self.batch_size, 1, dtype=torch.long)
        return ids, torch.ones_like(ids)

    def _parts(self, ids: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        step = _SEGMENTS_PER_CALL * self.cache.layout.segment
        for start in range(0, ids.shape[1], step):
            yield ids[:, start : start + step], None if mask is None else mask[:, start : start + step]
