"""Benchmarks: every figure is a ratio to a plain training step that was timed in the same run (see NOTES.md)."""

from __future__ import annotations

import os
import sys

OMP_SET_IN_TIME = "torch" not in sys.modules or os.environ.get("OMP_WAIT_POLICY") == "PASSIVE"
"""Whether idle threads sleep instead of spinning: OpenMP reads the variable once, when torch is first imported."""

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
