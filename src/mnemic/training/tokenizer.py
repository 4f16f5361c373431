"""A word-level tokenizer for small models trained from scratch: one word or mark, one token."""

from collections.abc import Iterable

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
    trainer = trainers.WordLevelTrainer(
        vocab_size=max(vocab_size, len(SPECIAL) + len(kept)),
        special_tokens=[*SPECIAL, *sorted(kept)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Words kept by name are ordinary words; only the first three stay special when decoding.
    vocabulary = {word: i for i, word in enumerate(sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id))}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.normalizer, plain.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
