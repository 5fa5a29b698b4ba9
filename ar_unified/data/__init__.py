"""From data sets to batches: documents are read once into token shards, and the loader packs them into rows.

sources/       what a config names -> a source of documents (items.py): one file for each form that data has
shapes.py      the embedded dataset (scenes.py: what it shows)
images.py      bytes -> uint8 RGB -> the size a model wants (sizes.py)
files.py       which files are read; encoding.py: how their text is decoded
checks/        what is in the data, as a person and as a model would see it
filters/       leave out items on request, and decide what a copy is
prepare/       sources -> token shards (shards.py), through the image tokenizer and the grammar, by all processes
packing/       which documents share a row, and which row comes when
loader.py      shards -> batches (batch.py), and images for an image tokenizer

balance.py computes the share of each source, counter_rng.py random numbers as functions of a counter.
"""
