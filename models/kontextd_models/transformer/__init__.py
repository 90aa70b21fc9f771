"""FLUX's forward pass over diffusers' modules, part by part. Knows tokens and weights; knows no presets and no steps.

`Forward` is what one request asks: the velocity at a step, of all tokens or with the reference's keys and values kept.
"""
