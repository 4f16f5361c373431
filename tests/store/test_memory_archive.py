"""The archive finds by cosine of means, keeps copies, and comes back from its file."""

import pytest
import torch

from mnemic import FileFormatError, InputError
from mnemic.store.memory_archive import MemoryArchive

LEVELS = ("document", "paragraph", "entity")


def filled(count: int = 9) -> MemoryArchive:
    torch.manual_seed(0)
    archive = MemoryArchive({"memory": "a name"})
    for i in range(count):
        archive.add(torch.randn(3, 8), LEVELS[i % 3], (4 * i, 4 * i + 4))
    return archive


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_the_nearest_by_cosine_of_means_come_first(level):
    archive, query = filled(), torch.randn(3, 8)
    scores = []
    for i, entry in enumerate(archive.entries):
        a, b = entry.memory.mean(0), query.mean(0)
        if level in (None, entry.level):
            scores.append((float(a @ b / (a.norm() * b.norm())), i))
    found = archive.find(query, level, count=4)
    assert [e for _, e in found] == [archive.entries[i] for _, i in sorted(scores, reverse=True)[:4]]
    assert [s for s, _ in found] == pytest.approx([s for s, _ in sorted(scores, reverse=True)[:4]], abs=1e-6)


def test_a_memory_finds_itself_whatever_its_length():
    archive = filled()
    for entry in archive.entries:
        (score, best), *_ = archive.find(7.5 * entry.memory)
        assert best is entry
        assert score == pytest.approx(1, abs=1e-6)


def test_what_is_kept_is_a_copy_without_a_graph():
    archive, memory = MemoryArchive(), torch.ones(2, 4, requires_grad=True)
    archive.add(memory * 1, "entity", (0, 3))
    with torch.no_grad():
        memory.zero_()
    assert torch.equal(archive.entries[0].memory, torch.ones(2, 4))
    assert not archive.entries[0].memory.requires_grad
    assert archive.nbytes == 2 * 4 * 4


def test_it_comes_back_from_its_file(tmp_path):
    archive = filled()
    archive.save(tmp_path / "archive")
    again = MemoryArchive.load(tmp_path / "archive")
    assert again.owner == archive.owner
    assert [(e.level, e.span) for e in again.entries] == [(e.level, e.span) for e in archive.entries]
    assert all(torch.equal(a.memory, b.memory) for a, b in zip(again.entries, archive.entries, strict=True))


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "archive"
    filled().save(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="damaged"):
        MemoryArchive.load(path)
    with pytest.raises(FileFormatError, match="expected a mnemic archive"):
        MemoryArchive.load(tmp_path / "nothing")


def test_bad_entries_and_questions_are_refused(tmp_path):
    archive = filled()
    with pytest.raises(InputError, match="shape"):
        archive.add(torch.zeros(2, 8), "entity", (0, 1))
    with pytest.raises(InputError, match="float64"):
        archive.add(torch.zeros(3, 8).double(), "entity", (0, 1))
    with pytest.raises(InputError, match="span"):
        archive.add(torch.zeros(3, 8), "entity", (4, 4))
    with pytest.raises(InputError, match="'chapter'; it has document, entity, paragraph"):
        archive.find(torch.zeros(3, 8), "chapter")
    with pytest.raises(InputError, match="shape"):
        archive.find(torch.zeros(2, 8))
    with pytest.raises(InputError, match="has none"):
        MemoryArchive().find(torch.zeros(3, 8))
    with pytest.raises(InputError, match="empty"):
        MemoryArchive().save(tmp_path / "archive")
