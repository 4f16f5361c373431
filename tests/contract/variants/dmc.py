"""DMC: merging, as it is attached, and without runs longer than the window."""

# Tiny hosts make keys far below the usual offset: with 0 about half of the tokens merge.
_SMALL = {"compression": 2.0, "offset": 0.0, "noise": False, "preset": "default"}
VARIANTS = {
    "dmc": _SMALL,
    "dmc_attach": {**_SMALL, "preset": "attach"},
    "dmc_split": {**_SMALL, "split_long_runs": True},
}
