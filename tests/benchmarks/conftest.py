"""Fixtures of the benchmark tests: the optional data folder and two tokenizers that need no files."""

import os
import re
from pathlib import Path

import pytest


class WordTokenizer:
    """Lossless: every word with the white space before it is a token."""

    def __init__(self):
        self.ids, self.words = {}, []

    def encode(self, text):
        out = []
        for word in re.findall(r"\s*\S+|\s+$", text):
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
            out.append(self.ids[word])
        return out

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


@pytest.fixture
def tokenizer():
    return WordTokenizer()


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE, trained here, as a Hugging Face fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from mnemic.benchmarks import prose

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator([document.text for document in prose("validation")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.delenv("MNEMIC_DATA", raising=False)


@pytest.fixture(scope="session")
def data():
    """The folder named by MNEMIC_DATA."""
    folder = os.environ.get("MNEMIC_DATA")
    if not folder:
        pytest.skip("MNEMIC_DATA is not set; this test needs the public data files")
    path = Path(folder)
    for part in ("babi-v1.2", "gutenberg-books", "babilong-index"):
        if not (path / part).is_dir():
            pytest.skip(f"MNEMIC_DATA has no {part}/")
    return path
