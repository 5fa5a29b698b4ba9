"""Estimates what a config would cost on hardware that this host lacks. It compiles the real programs for that hardware.

targets.py      "v5p:8x8x8,slices=2" -> devices that this host can compile for
programs.py     a config's train step, or its prefill and decode, compiled for a mesh of these devices
collectives.py  what the compiled module sends: kind, bytes, group and how often
memory.py       where a device's memory goes
roofline.py     the least time of a step, and how far training scales
advice.py       changes that would make a program fit if it is too large
search.py       the remat, rows per chip and mesh that train fastest
report.py       all of it as text, JSON and a page with an image

It imports training, sampling, model and parallel. Only cli imports it.
"""

CANDIDATES = 4  # how many candidates a search compiles by default
JOBS = ("train", "sample")  # what can be planned; "sample" means prefill and decode
