"""TransformerFAM: with past tokens, without, and with vectors that flow upwards."""

VARIANTS = {
    "transformer_fam": {"num_tokens": 3, "past": 16},
    "transformer_fam_normalised": {"num_tokens": 3, "past": 0, "normalise": True},
    "transformer_fam_stack": {"num_tokens": 3, "past": 5, "feedback": "stack"},
}
