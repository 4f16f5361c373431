"""Streams as bytes: what files hold, checked as files are."""

import pytest
import torch

from mnemic.core.errors import FileFormatError, InputError, StateError
from mnemic.core.files import from_bytes, to_bytes
from mnemic.hosts.saving import identity_of
from mnemic.hosts.stream import Stream
from tests.hosts.models import tiny_model
from tests.tiny import random_ids


@pytest.fixture(scope="module")
def model():
    return tiny_model("lm2")


@pytest.fixture(scope="module")
def data(model):
    return model.stream().feed([random_ids(13).tolist()]).to_bytes()


def test_bytes_are_those_of_the_file(model, data, tmp_path):
    stream = Stream.from_bytes(model, data)
    stream.save(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == data == stream.to_bytes()
    assert torch.equal(Stream.load(model, tmp_path / "one").cache.last_logits, stream.cache.last_logits)


def test_a_stream_from_bytes_goes_on_as_it_would_have(model, data):
    stream = model.stream().feed([random_ids(13).tolist()])
    options = {"return_ids": True, "max_new_tokens": 6, "do_sample": False}
    assert Stream.from_bytes(model, data).generate(**options) == stream.generate(**options)


def test_an_identity_taken_once_serves_many_streams(model, data):
    identity, stream = identity_of(model), model.stream().feed([random_ids(13).tolist()])
    assert stream.to_bytes(identity=identity) == data
    assert Stream.from_bytes(model, data, identity=identity).to_bytes() == data
    with pytest.raises(StateError, match="other weights"):
        Stream.from_bytes(model, data, identity=identity_of(tiny_model("lm2", seed=5)))


def test_without_one_a_stream_is_saved_with_the_weights_of_the_moment(tmp_path):
    own = tiny_model("lm2")
    stream = own.stream().feed([random_ids(13).tolist()])
    stream.save(tmp_path / "before")
    with torch.no_grad():
        for parameter in own.memory.parameters():
            parameter.data += 1
    stream.save(tmp_path / "after")
    Stream.load(own, tmp_path / "after")
    with pytest.raises(StateError, match="other weights"):
        Stream.load(own, tmp_path / "before")


def test_damage_anywhere_is_found(model, data):
    for place in range(0, len(data), max(1, len(data) // 150)):
        damaged = bytearray(data)
        damaged[place] ^= 0x41
        with pytest.raises((FileFormatError, StateError)):
            Stream.from_bytes(model, bytes(damaged))


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 200, -1])
def test_bytes_cut_short_are_refused(model, data, cut):
    with pytest.raises(FileFormatError, match="import 7"):
        Stream.from_bytes(model, data[:cut], what="The import 7")


def test_foreign_bytes_are_refused_with_the_reason(model, data):
    with pytest.raises(StateError):
        Stream.from_bytes(tiny_model("lm2", seed=5), data)
    with pytest.raises(FileFormatError, match="limit of 100"):
        Stream.from_bytes(model, data, max_bytes=100)
    with pytest.raises(FileFormatError, match="holds a mnemic state"):
        Stream.from_bytes(model, to_bytes("state", {}, {"x": torch.zeros(1)}))
    with pytest.raises(InputError, match="nothing to save"):
        model.stream().to_bytes()
    from safetensors.torch import save

    with pytest.raises(FileFormatError, match="did not write"):
        from_bytes(save({"x": torch.zeros(1)}), "stream")
