"""The embedded store with encryption: nothing readable, no state moved or changed, keys that change."""

import pytest

from mnemic.core.errors import ConfigError
from mnemic.serving.errors import SessionDamaged
from mnemic.serving.store import open_store

from .store_cases import KEY, MARK, T, commit, files, holding


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def sealed(folder):
    pytest.importorskip("cryptography")
    made = open_store(folder, keys=[KEY])
    made.create(T, session_id="s", metadata={"title": MARK.decode()})
    commit(made)
    yield made
    made.close()


def test_nothing_readable_is_stored(sealed, folder):
    assert sealed.get(T, "s").metadata == {"title": MARK.decode()}
    assert sealed.load(T, "s")[1] == MARK * 100
    assert files(folder)
    assert holding(folder) == []


def test_two_seals_of_one_state_differ(sealed, folder):
    commit(sealed, expected=1)
    one, two = (path.read_bytes() for path in files(folder))
    assert one[:16] == two[:16]
    assert one[16:] != two[16:]


def test_keys_are_changed_without_writing_all_anew(sealed, folder):
    sealed.close()
    new = b"n" * 32
    again = open_store(folder, keys=[new, KEY])
    assert again.load(T, "s")[1] == MARK * 100
    commit(again, expected=1)
    again.close()
    again = open_store(folder, keys=[new])
    try:
        with pytest.raises(SessionDamaged, match="add the one used then"):
            again.get(T, "s")
    finally:
        again.close()


def test_another_tenant_cannot_open_it(sealed):
    _, inner = sealed.store.load(T, "s")
    sealed.store.create("thief", session_id="s")
    sealed.store.commit("thief", "s", expected=0, state=inner, tokens_seen=1)
    with pytest.raises(SessionDamaged, match="was changed"):
        sealed.load("thief", "s")


def test_every_changed_bit_is_found(sealed):
    _, inner = sealed.store.load(T, "s")
    for place in (0, 8, 15, 16, 28, len(inner) // 2, len(inner) - 1):
        changed = bytearray(inner)
        changed[place] ^= 1
        version = sealed.store.get(T, "s").version
        sealed.store.commit(T, "s", expected=version, state=bytes(changed), tokens_seen=1)
        with pytest.raises(SessionDamaged):
            sealed.load(T, "s")
    for length in (0, 7, 16, 20, 28, 40):
        version = sealed.store.get(T, "s").version
        sealed.store.commit(T, "s", expected=version, state=inner[:length] or b"x", tokens_seen=1)
        with pytest.raises(SessionDamaged):
            sealed.load(T, "s")


def test_a_store_written_without_keys(folder):
    pytest.importorskip("cryptography")
    plain = open_store(folder)
    plain.create(T, session_id="s")
    commit(plain)
    plain.create(T, session_id="titled", metadata={"k": "v"})
    plain.close()
    sealed = open_store(folder, keys=[KEY])
    try:
        for call in (lambda: sealed.load(T, "s"), lambda: sealed.get(T, "titled")):
            with pytest.raises(SessionDamaged, match="not encrypted"):
                call()
    finally:
        sealed.close()


@pytest.mark.parametrize("keys", [[b"short"], ["x" * 32], [KEY, b""]], ids=["short", "text", "second"])
def test_keys_that_are_none(folder, keys):
    with pytest.raises(ConfigError, match="32 random bytes"):
        open_store(folder, keys=keys)
    assert not folder.exists()
