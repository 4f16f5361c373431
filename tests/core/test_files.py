"""Files of states: what is read does not depend on where it lay in the file."""

import torch

from mnemic.core import files
from mnemic.core.files import read_file, write_file


def test_what_is_read_lies_aligned_in_memory_of_its_own(tmp_path):
    """Sums over it are then those over the original, on every CPU; and the file may change."""
    tensors = {"a": torch.arange(3.0), "b": torch.arange(7.0), "c": torch.arange(5, dtype=torch.int8)}
    write_file(tmp_path / "x", "state", {}, tensors)
    data = (tmp_path / "x").read_bytes()
    _, mapped = read_file(tmp_path / "x", "state")
    (tmp_path / "x").write_bytes(bytes(len(data)))
    for found in (mapped, files.from_bytes(data, "state")[1]):
        assert all(torch.equal(found[n], t) for n, t in tensors.items())
        assert all(t.data_ptr() % 64 == 0 for t in found.values())
