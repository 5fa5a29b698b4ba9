"""From data sets to batches: documents are written once as token shards, and the loader packs them into rows.

sources/       open the data sets that a config names, with one file for each form of data (items.py defines a source)
shapes.py      makes the embedded dataset (scenes.py describes what its images show)
images.py      decodes image files to uint8 RGB and resizes them (sizes.py chooses the size)
files.py       finds the files to read; encoding.py decodes their text
checks/        show what is in the data, to a person and as a model would see it
filters/       leave out items on request, and decide what a copy is
prepare/       writes token shards (shards.py) from sources, with the image tokenizer and the grammar; processes share
               the work
packing/       decides which documents share a row, and in which order the rows come
loader.py      makes batches (batch.py) from shards, and batches of images for an image tokenizer

balance.py computes the share of each source. counter_rng.py computes random numbers as functions of a counter.
"""
