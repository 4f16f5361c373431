"""A word-level tokenizer for small models trained from scratch: one word or mark, one token."""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<unk>", "<eos>"]


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
