"""Reports as one HTML file that needs nothing else: no network, no script, no fonts. Knows HTML, SVG and pixels.

`figures.py` numbers as text, `html.py` pages and tables, `plot.py` time against fidelity, `pictures.py` pictures inside
a page; `bench.py` and `calibration.py` put the pages of the two commands together; `outcome.py` tells a calibration to
machines and terminals.
"""
