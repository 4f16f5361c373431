"""Files of streams: killed, damaged, foreign, on full disks. Whatever happens, a file is whole or refused.

As a script it is the process that some of these tests need beside them; see `main`.
"""

import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mnemic import FileFormatError, InputError, MnemicError, StateError, Stream
from mnemic.core import files
from mnemic.core.files import read_file, write_file
from tests.hosts.models import tiny_model
from tests.tiny import random_ids, tiny_host

ROOT = Path(__file__).resolve().parents[2]


def same_file(path, reference) -> bool:
    """Header and tensors of `path` are those of `reference`, bit for bit."""
    header, tensors = read_file(path, "stream")
    known, others = reference
    return (
        header == known
        and tensors.keys() == others.keys()
        and all(t.dtype == others[n].dtype and torch.equal(t, others[n]) for n, t in tensors.items())
    )


def beside(command: str, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    return subprocess.run(
        [*prefix, sys.executable, __file__, command, *arguments],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip


# Killed while saving


def large_streams():
    """A model and two streams of it, some megabytes each."""
    model = tiny_model("lm2", segment=64)
    return model, [model.stream(96).feed(random_ids(96, n, seed=n)) for n in (40, 63)]


def kill_savers(folder: Path, kills: int, seed: int) -> dict:
    """Fork a child that saves two streams over one path in turn, kill it at a random moment, look; `kills` times."""
    model, streams = large_streams()
    path, generator = folder / "kept.mnemic", random.Random(seed)
    references = []
    for stream in streams:
        start = time.perf_counter()
        stream.save(path)
        seconds = time.perf_counter() - start
        references.append(read_file(path, "stream"))
    found = {
        "bytes": path.stat().st_size,
        "save_seconds": seconds,
        "mid_write": 0,
        "versions": [0, 0],
        "bad": [],
        "strange": [],
    }
    for kill in range(kills):
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(tell, b"x")
            # Every other child begins with the other stream: on a slow machine none gets further than one save.
            turn = kill
            while True:
                streams[turn % 2].save(path)
                turn += 1
        os.read(ready, 1)
        time.sleep(generator.uniform(0, 3 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready), os.close(tell)
        left = [p for p in folder.iterdir() if p != path]
        found["mid_write"] += bool(left)
        found["strange"] += [p.name for p in left if not p.name.startswith(".kept.mnemic.tmp-")]
        for leftover in left:
            shutil.rmtree(leftover)
        try:
            which = [i for i, reference in enumerate(references) if same_file(path, reference)]
            loaded = Stream.load(model, path)
            assert torch.equal(loaded.cache.last_logits, streams[which[0]].cache.last_logits)
            found["versions"][which[0]] += 1
        except (MnemicError, IndexError, AssertionError) as error:
            found["bad"].append(f"kill {kill}: {error!r}")
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_a_saver_that_is_killed_leaves_the_old_file_or_the_new_one(kills, tmp_path):
    done = beside("kills", str(tmp_path), str(kills))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["bad"] == []
    # All that they left can be recognised and is removed later.
    assert found["strange"] == []
    assert sum(found["versions"]) == kills
    assert min(found["versions"]) > 0
    assert found["bytes"] > 2e6
    # The kills did hit savers at work on their temporary file.
    assert found["mid_write"] >= kills // 10


def test_what_killed_savers_left_is_removed_once_it_is_old(tmp_path):
    stream = tiny_model().stream().feed([3, 4, 5])
    old, young, other = (tmp_path / n for n in (".a.mnemic.tmp-old", ".a.mnemic.tmp-young", ".b.mnemic.tmp-old"))
    for path in (old, young, other):
        path.mkdir()
        (path / "a.mnemic").write_bytes(b"part of a file")
    hours_ago = time.time() - 2 * 3600
    os.utime(old, (hours_ago, hours_ago))
    os.utime(other, (hours_ago, hours_ago))
    stream.save(tmp_path / "a.mnemic")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.mnemic.tmp-young", ".b.mnemic.tmp-old", "a.mnemic"]


# Damaged and foreign files

LENGTH = 300


class Bomb:
    """Unpickling this leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A good file that uses every part of the format: open segment, traces, rows out of step."""
    path = tmp_path_factory.mktemp("good") / "good.mnemic"
    model.stream(2).feed([random_ids(5).tolist(), random_ids(19).tolist()]).save(path)
    return path


def damaged(good: bytes):
    """Names and contents of files that are `good` with something broken."""
    generator = random.Random(7)
    start = 8 + int.from_bytes(good[:8], "little")
    cuts = [*range(1, 11), start - 1, start, start + 1, len(good) - 1]
    cuts += [generator.randrange(11, len(good) - 1) for _ in range(66)]
    for cut in cuts:
        yield f"cut at {cut}", good[:cut]
    regions = [(0, 8, 20), (8, start, 70), (start, len(good), 60)]
    for low, high, count in regions:
        for _ in range(count):
            place, bit = generator.randrange(low, high), generator.randrange(8)
            broken = bytearray(good)
            broken[place] ^= 1 << bit
            yield f"bit {bit} of byte {place} flipped", bytes(broken)
    for i in range(8):
        yield f"random bytes {i}", generator.randbytes(generator.randrange(1, 5000))
    yield "empty", b""
    yield "doubled", good + good
    yield "a byte more", good + b"\0"
    yield "header only", good[:start]
    yield "data only", good[start:]
    yield "zeros", bytes(len(good))
    yield "huge header length", b"\xff" * 8 + good[8:]
    yield "text", b"Where is Mary?"
    yield "json", b'{"kind": "stream"}'
    half = len(good) // 2
    yield "halves swapped", good[half:] + good[:half]


def foreign(folder: Path, bomb: Bomb):
    """Files in other formats, written to `folder`: names and paths."""
    tensors = {"state/bank": torch.zeros(1, 1, 8, 32), "last_logits": torch.zeros(1, 61)}
    deep = "[" * 100_000 + "]" * 100_000
    metadata = {
        "safetensors by others": None, "safetensors with metadata": {"format": "pt"}, "not json": {"mnemic": "{"},
        "a list": {"mnemic": "[]"}, "null": {"mnemic": "null"}, "no checksum": {"mnemic": '{"kind": "stream"}'},
        "a number as checksum": {"mnemic": '{"kind": "stream", "checksum": 3}'}, "deep json": {"mnemic": deep},
    }  # fmt: skip
    for name, one in metadata.items():
        save_file(tensors, folder / name, metadata=one)
    (folder / "pickle").write_bytes(pickle.dumps(bomb))
    (folder / "old pickle").write_bytes(pickle.dumps(bomb, protocol=0))
    torch.save({"state": bomb}, folder / "torch")
    torch.save({"state": bomb}, folder / "old torch", _use_new_zipfile_serialization=False)
    np.savez(folder / "numpy.npz", state=np.zeros(3))
    np.save(folder / "objects.npy", np.array([bomb], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(bomb))
    yield from ((p.name, p) for p in sorted(folder.iterdir()))
    (folder / "a folder").mkdir()
    yield "a folder", folder / "a folder"
    yield "missing", folder / "missing"
    (folder / "dangling").symlink_to(folder / "missing")
    yield "dangling link", folder / "dangling"
    os.mkfifo(folder / "pipe")
    yield "pipe", folder / "pipe"


def forged(good: Path, folder: Path):
    """Files whose checksum is right and whose content is not."""
    header, tensors = read_file(good, "stream")
    own = ("kind", "format_version")
    changes = [{k: ...} for k in ("memory", "segment", "host", "memory_fingerprint", "open", "seen")]
    changes += [
        {"memory": 3}, {"memory": None}, {"segment": "8"}, {"host": {}}, {"host": {"fingerprint": {}}},
        {"host": {"fingerprint": {"structure": 1, "sample": "x"}}}, {"memory_fingerprint": []}, {"open": []},
        {"open": 3}, {"open": ["a", "b"]}, {"open": [5]}, {"open": [5, 8]}, {"open": [-1, 3]}, {"open": [2**70, 3]},
        {"open": [0.5, 3]}, {"seen": [0, 0]}, {"seen": [-5, 19]}, {"seen": None}, {"open": [[5, 3]], "seen": [[5, 19]]},
    ]  # fmt: skip
    for i, change in enumerate(changes):
        full = {k: v for k, v in {**header, **change}.items() if v is not ... and k not in own}
        write_file(folder / f"header {i}", "stream", full, tensors)
        yield f"header {change}", folder / f"header {i}"
    kept = {k: v for k, v in header.items() if k not in own}
    lacking = ("state/bank", "last_logits", "values/0")
    parts = [(f"without {n}", {k: t for k, t in tensors.items() if k != n}) for n in lacking]
    parts += [
        ("no tensors", {}),
        ("another bank", {**tensors, "state/bank": torch.zeros(2, 1, 9, 32)}),
        ("one row", {**tensors, "state/bank": tensors["state/bank"][:1]}),
        ("one row of logits", {**tensors, "last_logits": tensors["last_logits"][:1]}),
        ("more state", {**tensors, "state/more": torch.zeros(2, 3)}),
        ("flat keys", {**tensors, "keys/0": torch.zeros(2, 3)}),
        ("long keys", {**tensors, "keys/0": torch.zeros(2, 300, 2, 8)}),
        ("a layer that is no number", {**tensors, "keys/x": tensors["keys/0"]}),
        ("a trace of one row", {**tensors, "trace/0/query": tensors["trace/0/query"][:1]}),
        ("a trace without a name", {**tensors, "trace/0": tensors["last_logits"]}),
    ]
    for i, (name, changed) in enumerate(parts):
        write_file(folder / f"tensors {i}", "stream", kept, changed)
        yield name, folder / f"tensors {i}"


def strangers(folder: Path):
    """Good streams of other models."""
    others = {
        "another memory": tiny_model("rmt"),
        "no memory": tiny_model("none"),
        "another number of slots": tiny_model(num_slots=4),
        "another number of heads": tiny_model(num_heads=2),
        "another segment": tiny_model(segment=16),
        "a wider host": tiny_model(host=tiny_host("llama", hidden_size=64)),
        "a deeper host": tiny_model(host=tiny_host("llama", num_hidden_layers=3)),
        "another vocabulary": tiny_model(host=tiny_host("llama", vocab_size=70)),
        "another architecture": tiny_model(host="gpt2"),
        "a close architecture": tiny_model(host="qwen3"),
        "other weights of the host": tiny_model(host=tiny_host("llama", seed=1)),
        "other weights of the memory": tiny_model(seed=1),
    }
    for name, other in others.items():
        other.stream().feed(random_ids(13).tolist()).save(folder / name)
        yield name, folder / name


def test_300_damaged_and_foreign_files_are_refused(model, saved, tmp_path, monkeypatch):
    good, mark = saved.read_bytes(), tmp_path / "mark"
    folders = {n: tmp_path / n for n in ("damaged", "foreign", "forged", "strangers", "other")}
    for folder in folders.values():
        folder.mkdir()
    cases = []
    for i, (name, content) in enumerate(damaged(good)):
        path = folders["damaged"] / f"{i}.mnemic"
        path.write_bytes(content)
        cases.append((name, path, FileFormatError))
    cases += [(name, path, FileFormatError) for name, path in foreign(folders["foreign"], Bomb(mark))]
    cases += [(name, path, (FileFormatError, StateError)) for name, path in forged(saved, folders["forged"])]
    cases += [(name, path, StateError) for name, path in strangers(folders["strangers"])]

    header, tensors = read_file(saved, "stream")
    write_file(folders["other"] / "kind", "adapter", header, tensors)
    cases.append(("another kind", folders["other"] / "kind", FileFormatError))
    for version in (2, 99, "x", None):
        monkeypatch.setattr(files, "FORMAT_VERSION", version)
        write_file(folders["other"] / f"version {version}", "stream", header, tensors)
        monkeypatch.undo()
        cases.append((f"version {version}", folders["other"] / f"version {version}", FileFormatError))
    # More than the default limit; only its length exists on the disk.
    with open(folders["other"] / "vast", "wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    cases.append(("vast", folders["other"] / "vast", FileFormatError))

    wrong = []
    for name, path, expected in cases:
        try:
            model.stream(load=path)
            wrong.append(f"{name}: accepted")
        except MnemicError as error:
            if not isinstance(error, expected) or str(path) not in str(error):
                wrong.append(f"{name}: {error!r}")
        except BaseException as error:
            wrong.append(f"{name}: raised {error!r}")
    assert wrong == [], "\n".join(wrong)
    assert not mark.exists()
    assert len(cases) >= LENGTH, len(cases)
    print(f"{len(cases)} files refused")
    # The bomb is a real one, and the good file is still good.
    pickle.loads((folders["foreign"] / "pickle").read_bytes())
    assert mark.exists()
    assert model.stream(load=saved).tokens_seen == [5, 19]


@pytest.mark.slow
def test_a_flip_in_any_byte_of_the_header_is_found_or_means_nothing(model, saved, tmp_path):
    good, reference, generator = saved.read_bytes(), read_file(saved, "stream"), random.Random(3)
    accepted = []
    for place in range(8 + int.from_bytes(good[:8], "little")):
        broken = bytearray(good)
        broken[place] ^= 1 << generator.randrange(8)
        path = tmp_path / "broken"
        path.write_bytes(broken)
        try:
            model.stream(load=path)
            # JSON can spell one value in two ways (1e-05, 1E-05).
            assert same_file(path, reference), place
            accepted.append(place)
        except FileFormatError as found:
            message = str(found)
            assert str(path) in message
    assert len(accepted) < 10


def test_newer_formats_and_large_files_say_what_to_do(model, saved, tmp_path, monkeypatch):
    with pytest.raises(FileFormatError, match=r"good\.mnemic has [\d,]+ bytes.*limit of 1,000.*raise max_bytes"):
        Stream.load(model, saved, max_bytes=1000)
    assert Stream.load(model, saved, max_bytes=saved.stat().st_size).tokens_seen == [5, 19]
    header, tensors = read_file(saved, "stream")
    monkeypatch.setattr(files, "FORMAT_VERSION", 2)
    write_file(tmp_path / "newer", "stream", header, tensors)
    monkeypatch.undo()
    with pytest.raises(FileFormatError, match=r"newer has format version 2.*reads up to 1.*Upgrade"):
        model.stream(load=tmp_path / "newer")
    write_file(tmp_path / "adapter", "adapter", header, tensors)
    with pytest.raises(FileFormatError, match="holds a mnemic adapter; expected a mnemic stream file"):
        model.stream(load=tmp_path / "adapter")


def test_a_stranger_is_told_what_differs(model, tmp_path):
    expected = {
        "another memory": "memory: 'rmt' there, 'lm2' here",
        "another number of slots": r"another memory \(num_slots: 4 there, 8 here\)",
        "another segment": "segments of 16 tokens, this model 8",
        "a wider host": "host of another architecture or width",
        "another architecture": "host of another architecture or width",
        "other weights of the host": "other weights of the host",
        "other weights of the memory": "other weights of the memory",
    }
    paths = dict(strangers(tmp_path))
    for name, message in expected.items():
        with pytest.raises(StateError, match=message):
            model.stream(load=paths[name])


# Disks


@pytest.fixture
def kept(model, tmp_path):
    """A file that a failing save must leave alone, and a stream that is to replace it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    model.stream().feed([3, 4, 5]).save(folder / "a.mnemic")
    return folder / "a.mnemic", model.stream().feed(random_ids(30).tolist())


@pytest.mark.parametrize("moment", ["write", "flush", "rename"])
def test_a_disk_that_fails_leaves_the_old_file(kept, moment, monkeypatch):
    path, stream = kept
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(tensors, filename, metadata):
        Path(filename).write_bytes(b"half a file")
        fail()

    if moment == "write":
        monkeypatch.setattr(files, "save_file", half)
    else:
        monkeypatch.setattr(os, {"flush": "fsync", "rename": "replace"}[moment], fail)
    with pytest.raises(InputError, match=r"Could not write .*a\.mnemic: .*No space left on device.*untouched"):
        stream.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.mnemic"]
    stream.save(path)
    assert path.read_bytes() != before


def fill(folder: Path, limit: int | None) -> dict:
    """Save more than fits over a file that fits; what came of it."""
    model, (stream, _) = large_streams()
    path = folder / "kept.mnemic"
    small = stream.select([0])
    small.save(path)
    before = path.read_bytes()
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        stream.save(path)
        error = ""
    except InputError as found:
        error = str(found)
    reloaded = model.stream(load=path)
    return {
        "error": error, "whole": path.read_bytes() == before, "files": [p.name for p in folder.iterdir()],
        "reloaded": torch.equal(reloaded.cache.last_logits, small.cache.last_logits),
    }  # fmt: skip


def check_filled(done, reason):
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "kept.mnemic" in found["error"]
    assert reason in found["error"]
    assert found["whole"]
    assert found["reloaded"]
    assert found["files"] == ["kept.mnemic"]


def test_a_write_that_stops_midway_leaves_the_old_file(tmp_path):
    check_filled(beside("fill", str(tmp_path), "1000000"), "File too large")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    # A small disk of its own, in name spaces that end with the process.
    isolated = ("unshare", "--user", "--map-root-user", "--mount")
    try:
        probe = subprocess.run([*isolated, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no unshare command")
    if probe.returncode:
        pytest.skip(f"not permitted to mount: {probe.stderr.decode().strip()}")
    inside = f'mount -t tmpfs -o size=1m tmpfs "{tmp_path}" && exec "$@"'
    check_filled(beside("fill", str(tmp_path), "0", prefix=(*isolated, "sh", "-c", inside, "sh")), "No space left")


def test_folders_that_cannot_be_written(kept, tmp_path, monkeypatch):
    path, stream = kept
    with pytest.raises(InputError, match=r"Cannot write .*missing/a\.mnemic: No such file.*Choose a folder"):
        stream.save(tmp_path / "missing" / "a.mnemic")
    with pytest.raises(InputError, match=r"Cannot write .*b\.mnemic: Not a directory"):
        stream.save(path / "b.mnemic")
    with pytest.raises(InputError, match=r"Could not write .*disk"):
        stream.save(path.parent)
    assert [p.name for p in tmp_path.iterdir()] == ["disk"]

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # Permissions do not stop every user that tests run as.
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(InputError, match=r"Cannot write .*a\.mnemic: Permission denied"):
        stream.save(path)


def main() -> None:
    """kills FOLDER COUNT: see `kill_savers`. fill FOLDER BYTES: see `fill`."""
    torch.set_num_threads(1)
    command, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(kill_savers(folder, number, seed=0) if command == "kills" else fill(folder, number or None)))


if __name__ == "__main__":
    main()
