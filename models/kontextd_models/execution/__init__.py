"""How the transformer's blocks run on a device: precision, compilation, attention. Knows no requests and no steps.

`planning.py` what is asked for and can be had, `precision.py` which layers run in float8, `fp8.py` puts them there,
`attention_backends.py` and `compilation.py` the ways to run a block, `blocks.py` takes the first that works.
"""
