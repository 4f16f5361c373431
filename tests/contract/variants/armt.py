"""ARMT: with matrices, and with tokens carried layer by layer (PRMT).

With far fewer features than 6 * 16, random keys often share next to none with the normaliser; what is then divided by
almost nothing shows float32 rounding, in whatever calls the input comes.
"""

VARIANTS = {"armt": {"num_tokens": 3, "key_width": 16}, "armt_prmt": {"num_tokens": 3, "preset": "prmt"}}
