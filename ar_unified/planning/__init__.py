"""Estimates what a config would cost on hardware that this host lacks. It compiles the real programs for that hardware.

targets.py      devices to compile for, from a name such as "v5p:8x8x8,slices=2"
programs.py     a config's train step, or its prefill and decode, compiled for a mesh of these devices
hlo.py          the instructions of the compiled module
collectives.py  what the compiled module sends: kind, bytes, group and how often
loops.py        what one iteration of its loops does
memory.py       where a device's memory goes
roofline.py     the least time of a step
scaling.py      how far training scales
advice.py       changes that would make a program fit if it is too large
plan.py         all of it as one plan, in plain values
search.py       the remat, rows per chip and mesh that train fastest
report.py       a plan as text
page.py         a plan as a page with charts

It imports training, sampling, model and parallel. Only cli imports it.
"""

CANDIDATES = 4  # how many candidates a search compiles by default
JOBS = ("train", "sample")  # what can be planned; "sample" means prefill and decode
