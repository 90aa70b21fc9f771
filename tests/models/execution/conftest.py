"""The way to the adapters made by hand that tests of LoRAs use."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "lora"))  # tests are imported by path
