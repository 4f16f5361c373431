"""BABILong: bAbI facts hidden in order between sentences of long texts; sample builder and scorer.

Paper: Kuratov et al., BABILong: Testing the Limits of LLMs with Long Context Reasoning-in-a-Haystack, 2024
(arXiv 2406.10149). A sample of N tokens has a budget of N - 300 (300 are kept for the prompt): the facts, in story
order, at slots drawn uniformly with replacement between background sentences that fill the rest.

N counts tokens of the tokenizer that is passed in. The official sets count GPT-2 BPE tokens whatever the model, so
pass a GPT-2 tokenizer to get their lengths.

Deviations from the published scripts, all deliberate: 0k has a branch of its own (facts only); the last sample of a
file is used too (`official_subset` gives the published 100); test facts come from the bAbI test file; a window of
background is at least 1,000 characters, so that very short samples find sentences; samples whose facts alone exceed
the budget are left out; random draws are Python's, so positions and background differ from the published files;
sentences are split by `background.sentence_spans`.
"""

from .builder import Babilong
from .opening import LENGTHS, data_folder, official_subset, open_babilong
from .sample import BabilongSample, StreamedSample, prompt
from .scoring import LABELS, compare_answers, compare_answers_fixed

__all__ = [
    "LABELS", "LENGTHS", "Babilong", "BabilongSample", "StreamedSample", "compare_answers", "compare_answers_fixed",
    "data_folder", "official_subset", "open_babilong", "prompt",
]  # fmt: skip
