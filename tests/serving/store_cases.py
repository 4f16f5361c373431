"""Stores for tests: each kind by name, and a private PostgreSQL server where one is installed."""

import atexit
import contextlib
import functools
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from mnemic.serving.store import SessionStore, open_store

KINDS = ("embedded", "encrypted", "postgres")
MARK = b"PLANTED-MARKER-7319"
T = "tenant"
KEY = bytes(range(32))

_schemas = itertools.count()


@contextlib.contextmanager
def opened(kind: str, folder: Path, **options) -> Iterator[SessionStore]:
    """A new store of this kind. Skips where what it needs is not installed."""
    store = open_store(url_of(kind, folder), **keys_of(kind), **options)
    try:
        yield store
    finally:
        store.close()


def keys_of(kind: str) -> dict[str, list[bytes]]:
    if kind != "encrypted":
        return {}
    pytest.importorskip("cryptography")
    return {"keys": [KEY]}


def url_of(kind: str, folder: Path) -> str:
    return new_schema() if kind == "postgres" else str(folder / "store")


def new_schema(**settings: str) -> str:
    """Address of an empty schema of the private server."""
    psycopg = pytest.importorskip("psycopg")
    pytest.importorskip("psycopg_pool")
    server, name = the_server(), f"test{next(_schemas)}"
    with psycopg.connect(server.url(), autocommit=True) as db:
        db.execute(f"CREATE SCHEMA {name}")
    return server.url(search_path=name, **settings)


def fast_folder(otherwise: Path) -> Path:
    """A new folder in memory, where a test makes many durable writes and tests something else."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        return otherwise
    folder = Path(tempfile.mkdtemp(prefix="mnemic-test-", dir=memory))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class PostgresServer:
    """A server of one's own in a temporary folder, reached through a socket there."""

    def __init__(self, programs: Path, user: str | None):
        self.programs = programs
        # The path of a socket is short.
        self.folder = Path(tempfile.mkdtemp(prefix="mnemic-pg-", dir="/tmp"))
        self.data = self.folder / "data"
        self._as: list[str] = []
        if user is not None:
            shutil.chown(self.folder, user, user)
            self._as = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        self._run("initdb", "-D", self.data, "-U", "mnemic", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        self.start()

    def start(self) -> None:
        # Processes are killed here, machines are not: what was handed to the kernel stays.
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c fsync=off -c max_connections=60"
        self._run("pg_ctl", "-D", self.data, "-l", self.folder / "log", "-w", "-o", options, "start")

    def stop(self, mode: str) -> None:
        self._run("pg_ctl", "-D", self.data, "-w", "-m", mode, "stop")

    def close(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def url(self, **settings: str) -> str:
        options = quote(" ".join(f"-c {name}={value}" for name, value in settings.items()))
        return f"postgresql:///postgres?host={quote(str(self.folder), safe='')}&user=mnemic&options={options}"

    def _run(self, program: str, *arguments: object) -> None:
        subprocess.run(
            [*self._as, str(self.programs / program), *map(str, arguments)],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            timeout=100,
        )


@functools.cache
def the_server() -> PostgresServer:
    """Started at the first call. Skips where PostgreSQL is not installed or cannot be run."""
    server = new_server()
    atexit.register(server.close)
    return server


def new_server() -> PostgresServer:
    places = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    programs = next((p for p in places if (p / "initdb").exists() and (p / "pg_ctl").exists()), None)
    if programs is None:
        pytest.skip("PostgreSQL (initdb, pg_ctl) is not installed")
    user = None
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no setpriv to run it as another user")
        user = "postgres" if _exists("postgres") else "nobody"
    return PostgresServer(programs, user)


def _exists(user: str) -> bool:
    import pwd

    return any(entry.pw_name == user for entry in pwd.getpwall())


def commit(store, session_id="s", expected=0, state=MARK * 100):
    return store.commit(T, session_id, expected=expected, state=state, tokens_seen=expected + 1)


def files(folder):
    return [path for path in (folder / "states").rglob("*") if path.is_file()]


def holding(folder, mark=MARK):
    return [path.name for path in folder.rglob("*") if path.is_file() and mark in path.read_bytes()]
