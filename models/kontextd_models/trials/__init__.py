"""Rows of presets tried on an operator's own weights, photos and LoRAs. Knows engines and figures; writes no files.

`cases.py` what is edited, `running.py` one edit by one row, `benching.py` the presets side by side, `tally.py` their
figures; `candidates.py` the rows that `sweeping.py` tries within a budget, and `choosing.py` those that win.
"""
