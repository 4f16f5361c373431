"""LV-Eval (arXiv 2402.05136): ten of its eleven sets, five lengths each, from the released JSON lines.

An answer first has to say the key words: where their recall is below 0.2 (English) or 0.4 (Chinese) it scores 0,
otherwise the F1 of its words with the reference. Chinese words are those that jieba cuts. The eleventh set,
dureader_mixup, is scored by ROUGE and left out. Prompts are our own; contexts are whole.

What the fixed rule repairs: the released one looks at the first reference only; words of its black list count as key
words that cannot be said; and the F1 still counts them, though the paper takes them out. Released scorers stop at key
words of nothing but articles and marks; here those are no key words.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..core.errors import MissingExtraError, UnknownNameError
from .infinitebench import MARKS
from .longbench import QUESTION, english_words, words_f1
from .released import released_records
from .task import Record, Task

SOURCE = "https://huggingface.co/datasets/Infinigence/LVEval, NAME.zip with NAME_LENGTH.jsonl for each length"
LENGTHS = ("16k", "32k", "64k", "128k", "256k")
"""Words of the longest contexts; characters in Chinese."""

_CHINESE_QUESTION = "用几个词回答关于上文的问题。\n问题：{}\n回答："


def lveval_records(name: str, data: str | Path, *, seed: int = 0) -> Iterator[Record]:
    """Records of one set at one length ("factrecall_en_16k"); data: its .jsonl, or the folder with it.

    The file fixes them, so `seed` does nothing. metadata: set, asked, length (words, or characters in Chinese) and
    keywords ("" where there are none).

    Raises:
        UnknownNameError: no such set. DataError: no such file, or another format.
        MissingExtraError: a Chinese set without jieba, which its rule needs.
    """
    if name not in LVEVAL_TASKS:
        raise UnknownNameError.of("LV-Eval set", name, LVEVAL_TASKS)
    spec = _SETS[name.rpartition("_")[0]]
    spec.language.words("")

    def make(given: dict[str, Any], where: str) -> Record:
        answers, keywords = given["answers"], given.get("answer_keywords") or ""
        if not isinstance(answers, list) or not answers or not all(isinstance(t, str) for t in (*answers, keywords)):
            raise ValueError(f"answers {answers!r} and key words {keywords!r}")
        return Record(
            context=given["context"],
            question=spec.language.question.format(given["input"]),
            targets=tuple(answers),
            metadata={"set": name, "asked": given["input"], "length": given["length"], "keywords": keywords},
        )

    return released_records(name, data, SOURCE, make)


# Rules


def keyword_f1(said: Sequence[str], right: Sequence[str], keys: Sequence[str], language: "Language") -> float:
    """F1 of the words; 0 where too few key words are said. Words of the black list are never said."""
    if keys:
        met = Counter(said) & Counter(keys)
        if sum(count for word, count in met.items() if word not in language.black) / len(keys) < language.least:
            return 0.0
    return words_f1(said, right)


def keyword_f1_fixed(said: Sequence[str], right: Sequence[str], keys: Sequence[str], language: "Language") -> float:
    """As `keyword_f1`, on words without the black list, unless the reference has no others."""
    if any(word not in language.black for word in right):
        said, right = _without(said, language.black), _without(right, language.black)
    return keyword_f1(said, right, _without(keys, language.black), language)


def _without(words: Sequence[str], black: frozenset[str]) -> list[str]:
    return [word for word in words if word not in black]


def official(answer: str, record: Record) -> float:
    """The released rule of the record's set, with the first reference."""
    return _score(keyword_f1, answer, record.targets[0], record)


def fixed(answer: str, record: Record) -> float:
    """The rule as the paper has it, the best over the references."""
    return max(_score(keyword_f1_fixed, answer, target, record) for target in record.targets)


def _score(rule: Callable[..., float], answer: str, target: str, record: Record) -> float:
    spec = _SETS[record.metadata["set"].rpartition("_")[0]]
    language = spec.language
    said, right = language.words(answer), language.words(target)
    if not spec.gated:
        return words_f1(said, right)
    keywords = record.metadata["keywords"]
    keys = language.words(keywords) if keywords else right if language.answer_is_key else ()
    return rule(said, right, keys, language)


# Words


def _chinese_words(text: str) -> list[str]:
    pieces = ("".join(c for c in word.lower() if c not in MARKS).split() for word in _cutter().cut(text))
    return [word for word in map("".join, pieces) if word]


@lru_cache(maxsize=1)
def _cutter() -> Any:
    try:
        import jieba  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError("LV-Eval's rule cuts Chinese words with jieba: pip install jieba.") from error
    cutter = jieba.Tokenizer()
    # By itself it would unmarshal a file of a known name in the shared temporary folder.
    cutter.FREQ, cutter.total = cutter.gen_pfdict(cutter.get_dict_file())
    cutter.initialized = True
    return cutter


@dataclass(frozen=True)
class Language:
    """How a language is scored: words, the words that say nothing, the least recall of key words."""

    question: str
    words: Callable[[str], list[str]]
    black: frozenset[str]
    least: float
    answer_is_key: bool


_ENGLISH_BLACK = {
    "and", "to", "of", "in", "her", "was", "with", "for", "it", "from", "is", "that", "his", "he", "by", "she",
    "they", "or", "at", "because", "be", "on", "are", "their", "what", "as", "had", "were", "about", "being", "this",
    "who", "but", "have", "has", "when", "which", "does",
}  # fmt: skip
_CHINESE_BLACK = {
    "的", "和", "是", "等", "在", "年", "可以", "为", "与", "‰", "了", "或", "一种", "月", "c", "至", "日", "有",
    "进行", "于", "不", "中", "×", "根据", "小", "由", "亩", "也", "要", "指", "法", "会", "元", "主要", "以及",
    "通过", "首先", "对", "然后", "号", "以", "所", "后", "丁", "包括", "无", "将", "用", "能", "形", "方面", "因素",
    "位于", "而", "从", "到", "一定", "用于", "但", "使用", "让", "具有", "并", "亿元", "万元", "上", "类", "基于",
    "才", "来", "地", "片", "其他", "个", "或者", "变得", "时", "给", "你", "使", "条", "受", "已经", "带", "度",
}  # fmt: skip
ENGLISH = Language(QUESTION, english_words, frozenset(_ENGLISH_BLACK), 0.2, answer_is_key=False)
CHINESE = Language(_CHINESE_QUESTION, _chinese_words, frozenset(_CHINESE_BLACK), 0.4, answer_is_key=True)


@dataclass(frozen=True)
class _Set:
    language: Language
    max_new_tokens: int = 64
    gated: bool = True


_SETS = {
    "hotpotwikiqa_mixup": _Set(ENGLISH),
    "loogle_SD_mixup": _Set(ENGLISH),
    "loogle_CR_mixup": _Set(ENGLISH),
    "loogle_MIR_mixup": _Set(ENGLISH),
    "multifieldqa_en_mixup": _Set(ENGLISH),
    "multifieldqa_zh_mixup": _Set(CHINESE),
    "factrecall_en": _Set(ENGLISH, 16, gated=False),
    "factrecall_zh": _Set(CHINESE, 16, gated=False),
    "cmrc_mixup": _Set(CHINESE),
    "lic_mixup": _Set(CHINESE),
}


def _task(name: str, max_new_tokens: int) -> Task:
    records: Any = partial(lveval_records, name)
    return Task(f"lveval {name}", SOURCE, records, official, fixed, max_new_tokens)


LVEVAL_TASKS = {
    f"{name}_{length}": _task(f"{name}_{length}", spec.max_new_tokens)
    for name, spec in _SETS.items()
    for length in LENGTHS
}
