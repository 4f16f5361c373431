"""Tokenizers made from text, for models trained from scratch: word-level, or byte-level BPE that reads anything."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..core.errors import ConfigError, InputError

SPECIAL = ["<pad>", "<unk>", "<eos>"]
BYTES = 256


def word_tokenizer(texts: Iterable[str], vocab_size: int = 4096, always: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """The most frequent words of `texts`.

    Args:
        vocab_size: at most so many tokens, special ones included.
        always: texts whose words are kept however rare they are (questions and answers of a task).
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    kept = {word for text in always for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)}
    size = max(vocab_size, len(SPECIAL) + len(kept))
    trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=[*SPECIAL, *sorted(kept)], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # Made anew, so that words kept by name are ordinary ones and only the first three stay special when decoding.
    ids = tokenizer.get_vocab()
    return listed_tokenizer(sorted(ids, key=ids.__getitem__), pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def listed_tokenizer(words: Sequence[str], **special: str) -> PreTrainedTokenizerFast:
    """Exactly these words, in this order; `special` says which are pad_token, unk_token and eos_token.

    Without an unk_token, other words cannot be read: encoding raises.
    """
    unknown = special.get("unk_token", "<unk>")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def numbered_tokenizer(count: int) -> PreTrainedTokenizerFast:
    """For tasks made of token ids: the words "0" to "count - 1", which are their own ids."""
    return listed_tokenizer([str(i) for i in range(count)])


def byte_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2): every text can be read and is given back exactly.

    Args:
        vocab_size: at most so many tokens: pad and end of text, 256 bytes, the rest merges.

    Raises:
        ConfigError: a vocabulary that leaves no room for one merge.
    """
    special = [SPECIAL[0], SPECIAL[2]]
    if vocab_size <= len(special) + BYTES:
        raise ConfigError(
            f"A byte-level tokenizer of {vocab_size} tokens: {len(special)} special ones and {BYTES} bytes come first; "
            f"give at least {len(special) + BYTES + 1}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, pad_token=special[0], eos_token=special[1]
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what decides the ids of a text: equal for a tokenizer and its saved copy."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any = tokenizer.get_vocab()
    if backend is not None:
        # Padding and truncation are settings of a call, and change while a tokenizer is used.
        whole = json.loads(backend.to_str())
        content = {key: value for key, value in whole.items() if key not in ("padding", "truncation", "version")}
    end = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps([content, end], sort_keys=True).encode()).hexdigest()


def find_tokenizer(*places: str | Path | None) -> Any:
    """The tokenizer of the first place, a folder or a name on the hub, that has one.

    Raises:
        InputError: none has.
    """
    named = [str(place) for place in places if place]
    for place in named:
        if Path(place).is_dir() and not (Path(place) / "tokenizer_config.json").is_file():
            continue
        try:
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError):
            continue
    raise InputError(f"No tokenizer in {' or '.join(named) or 'the model'}; name the folder of one.")
