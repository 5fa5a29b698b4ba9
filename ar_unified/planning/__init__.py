"""What a config would cost on hardware that is not here: its real programs are compiled for that hardware, and read.

targets.py      "v5p:8x8x8,slices=2" -> devices this host can compile for
programs.py     the train step, or prefill and decode, of a config, compiled for a mesh of them
collectives.py  what the compiled module sends: kind, bytes, group, how often
memory.py       where a device's memory goes
roofline.py     how long a step takes at least, and how far it scales
advice.py       what would make a program fit that does not
search.py       which remat, rows a chip and mesh train fastest
report.py       all of it as text, JSON and a page with an image

It stands on training, sampling, model and parallel; cli alone imports it.
"""

CANDIDATES = 4  # that a search compiles, unless told otherwise
JOBS = ("train", "sample")  # what can be planned; sample: prefill and decode
