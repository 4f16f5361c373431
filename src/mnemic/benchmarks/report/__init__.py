"""Reports of evaluations: terminal, JSON, CSV, one self-contained page, and figures for papers.

They are made from plain data, as it comes from JSON; None where a value is not known. A run is a model, task, length,
train_seed and seed.

- results: "title", "scale" (a badge, such as "CPU scale"), "settings", and three lists:
  - "models": model (its name), memory, parameters, state_bytes, tokens_trained, note;
  - "scores": a run with count, chance, mean_tokens, truncated, and under "official" and "fixed" mean, low and high;
  - "grouped": a run with by ("depth" or "distance"), value, count, official, fixed.
- costs, measured, so never twice the same: a run with seconds, tokens_per_second, peak_bytes.
"""

from ...analysis.drawing import check_plots
from .figures import save_figures
from .page import page
from .tables import print_report
from .writing import write_report

__all__ = ["check_plots", "page", "print_report", "save_figures", "write_report"]
