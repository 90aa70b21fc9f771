"""LoRA: read any dialect, merge any number, give the base back to the bit. Knows one model's parameters; no requests.

A file goes through `dialects` (key names → entries of the model's own parameters, from the header alone), `reading`
(checks and tensors → an `Adapter`) and `merging` (adapters and scales → weights, in place).
"""
