"""Acceleration presets: which steps run in full, with the reference kept, or not at all. Knows no weights, no requests.

`preset.py` a row, `table.py` the rows of a model, `planning.py` from a row to the steps of a request, `steps.py`
carries them out, `forecast.py` stands in for the steps that do not run.
"""
