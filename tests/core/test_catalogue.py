"""Catalogue: complete, without double entries, and every memory has its paper in it."""

import re
from dataclasses import FrozenInstanceError, fields

import pytest

from mnemic.core import memory_names
from mnemic.core.catalogue import Entry, catalogue

FAMILIES = {
    "recurrent", "retrieval", "cache", "online", "parametric", "attention", "knowledge", "text", "control",
    "perception", "theory", "engine", "benchmarks",
}  # fmt: skip
# Memories of no paper of their own: the two baselines, and the released code of LM2 beside "lm2".
WITHOUT_ENTRY = {"none", "window", "lm2-reference"}


@pytest.mark.parametrize("entry", catalogue().values(), ids=lambda entry: entry.name)
def test_an_entry_is_complete(entry):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry.name)
    assert re.fullmatch(r"\d{4}\.\d{5}", entry.arxiv)
    assert entry.family in FAMILIES
    assert type(entry.year) is int
    # A paper of the last days of a year may carry the number of the next.
    assert 0 <= 2000 + int(entry.arxiv[:2]) - entry.year <= 1
    assert 1 <= int(entry.arxiv[2:4]) <= 12
    for text in (entry.system, entry.title, entry.note):
        assert text == text.strip()
        assert text.isascii()
        assert text.count("(") == text.count(")")
    assert entry.system
    assert len(entry.title) > len("Attention")


def test_names_and_papers_are_unique():
    entries = catalogue()
    assert len(entries) == 132
    assert all(name == entry.name for name, entry in entries.items())
    for key in ("system", "title", "arxiv"):
        values = [getattr(entry, key) for entry in entries.values()]
        assert len(set(values)) == len(values), key
    assert {entry.family for entry in entries.values()} == FAMILIES


def test_known_entries():
    entries = catalogue()
    assert entries["gated-deltanet"] == Entry(
        name="gated-deltanet",
        system="Gated DeltaNet",
        title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
        year=2024,
        arxiv="2412.06464",
        family="online",
    )
    assert entries["titans"].year == 2024
    assert entries["titans"].arxiv == "2501.00663"
    assert entries["bench-babi"].family == "benchmarks"


def test_every_memory_has_an_entry():
    missing = set(memory_names()) - WITHOUT_ENTRY - set(catalogue())
    assert not missing


def test_what_is_built_is_not_stored():
    assert [field.name for field in fields(Entry)] == [
        "name", "system", "title", "year", "arxiv", "family", "note",
    ]  # fmt: skip


def test_the_catalogue_cannot_be_spoiled():
    catalogue().clear()
    assert "lm2" in catalogue()
    with pytest.raises(FrozenInstanceError):
        catalogue()["lm2"].year = 2000
