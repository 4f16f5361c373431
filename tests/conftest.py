"""Settings of all tests."""

import os

# Some virtual machines announce AMX and kill the process that uses it; read when torch is first imported.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
