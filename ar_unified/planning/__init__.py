"""Estimates what a config would cost on hardware that this host lacks, from its real programs compiled for it.

targets.py      "v5p:8x8x8,slices=2" -> devices that this host can compile for
programs.py     a config's train step, or its prefill and decode, compiled for a mesh of these devices
collectives.py  what the compiled module sends: kind, bytes, group and how often
memory.py       where a device's memory goes
roofline.py     the least time of a step, and how far training scales
advice.py       what would make a program fit that is too large
search.py       which remat, rows a chip and mesh train fastest
report.py       all of it as text, JSON and a page with an image

It imports training, sampling, model and parallel. Only cli imports it.
"""

CANDIDATES = 4  # how many candidates a search compiles by default
JOBS = ("train", "sample")  # what can be planned; "sample" is prefill and decode
