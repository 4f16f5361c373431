"""RMT-1M on decoders: as it is, and looking back at all its earlier states."""

VARIANTS = {"rmt_1m": {"num_tokens": 3}, "rmt_1m_retrieve": {"num_tokens": 3, "retrieve": True}}
