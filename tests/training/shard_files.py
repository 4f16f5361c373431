"""Small prepared folders, written without the command."""

from pathlib import Path

import numpy as np

from mnemic.training.shards import KIND, MANIFEST, TRAIN, TokenStore, token_type, write_json, write_shard


def store(folder: Path, documents: list[list[int]], *, per_shard: int = 3, vocabulary: int = 61, tokenizer: str = "t"):
    """A prepared folder with these documents and no tokenizer, opened."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_type(vocabulary)
    shards = [
        write_shard(
            folder, f"train-{i // per_shard:06}", [np.array(d, dtype) for d in documents[i : i + per_shard]], dtype
        )
        for i in range(0, len(documents), per_shard)
    ]
    content = {"dtype": dtype.str, "vocabulary": vocabulary, "tokenizer": tokenizer, "splits": {TRAIN: shards}}
    write_json(folder / MANIFEST, KIND, content)
    return TokenStore(folder)


def numbered(*lengths: int) -> list[list[int]]:
    """Documents whose tokens say where they stand: document d, token i is 100 d + i."""
    return [[100 * d + i for i in range(length)] for d, length in enumerate(lengths)]
