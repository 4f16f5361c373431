"""LongMemEval (arXiv 2410.10813): 500 questions about the history of one user, from a released file.

Answers are scored by a judge model, outside of this package: `write_hypotheses` writes what the released script reads.
The measures of retrieval need no judge and are here.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import DataError
from ..core.files import replace_atomically
from .conversations import find_file, read_samples
from .task import Record

LONGMEMEVAL = "https://github.com/xiaowu0162/LongMemEval, longmemeval_oracle.json, _s.json or _m.json"
_FILES = ("longmemeval_s.json", "longmemeval_oracle.json", "longmemeval_m.json")


def longmemeval_records(data: str | Path, *, user_turns_only: bool = False, seed: int = 0) -> Iterator[Record]:
    """Questions of LongMemEval, each with its own history; the file fixes them, so `seed` does nothing.

    The sessions come as JSON, by date. metadata: id, type, abstention, sessions (ids in the order of the context),
    evidence (ids of the sessions that hold the answer).

    Raises:
        DataError: no such file, or another format.
    """
    path = find_file(data, _FILES, "longmemeval", LONGMEMEVAL)
    for number, asked in enumerate(read_samples(path, LONGMEMEVAL), 1):
        try:
            parts = zip(asked["haystack_dates"], asked["haystack_session_ids"], asked["haystack_sessions"], strict=True)
            sessions = sorted(parts, key=lambda session: _date(session[0]))
            yield Record(
                context="\n\n".join(_session(date, turns, user_turns_only) for date, _, turns in sessions),
                question=f"Date of the question: {asked['question_date']}\nQuestion: {asked['question']}\nAnswer:",
                targets=(str(asked["answer"]),),
                metadata={
                    "id": asked["question_id"],
                    "type": asked["question_type"],
                    "abstention": asked["question_id"].endswith("_abs"),
                    "sessions": [name for _, name, _ in sessions],
                    "evidence": list(asked["answer_session_ids"]),
                },
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, question {number}: {error!r}; expected {LONGMEMEVAL}.") from error


def _session(date: str, turns: Sequence[Mapping[str, Any]], user_turns_only: bool) -> str:
    said = [
        {"role": turn["role"], "content": turn["content"]}
        for turn in turns
        if not user_turns_only or turn["role"] == "user"
    ]
    return f"Session of {date}:\n{json.dumps(said, ensure_ascii=False)}"


def _date(text: str) -> datetime:
    # "2023/05/20 (Sat) 02:21"
    return datetime.strptime(re.sub(r"\s*\(\w+\)", "", text).strip(), "%Y/%m/%d %H:%M")


def retrieval_scores(
    ranked: Sequence[str], evidence: Sequence[str], known: Sequence[str], k: int, rule: str = "official"
) -> dict[str, float]:
    """LongMemEval's measures of retrieval: "any" and "all" of the evidence among the first k, and NDCG@k.

    Args:
        ranked: ids, the best first. evidence: ids that should be found. known: all ids of the history.
        rule: "official" does not discount the second rank; "fixed" divides rank i by log2(i + 1).
    """
    found = set(ranked[:k])
    right = set(evidence)
    gains = [float(name in right) for name in ranked[:k]]
    best = [1.0] * min(k, sum(name in right for name in known))
    ideal = _discounted(best, rule)
    return {
        "any": float(bool(right & found)),
        "all": float(right <= found),
        "ndcg": _discounted(gains, rule) / ideal if ideal else 0.0,
    }


def _discounted(gains: Sequence[float], rule: str) -> float:
    if not gains:
        return 0.0
    ranks = np.arange(2, len(gains) + 1)
    # In the released order of summation, so that equal means equal to the last bit.
    return float(gains[0] + np.sum(np.asarray(gains[1:]) / np.log2(ranks if rule == "official" else ranks + 1)))


def write_hypotheses(path: str | Path, answers: Mapping[str, str]) -> None:
    """Answers by question id, as LongMemEval's judge script reads them: a line {question_id, hypothesis} each."""
    lines = (
        json.dumps({"question_id": name, "hypothesis": said}, ensure_ascii=False) for name, said in answers.items()
    )
    text = "".join(f"{line}\n" for line in lines)
    replace_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))
