"""From data sets to batches: documents are read once into token shards, and the loader packs them into rows.

sources.py     what a config names -> a source (items.py): named, rows, image_folder, text_files, shapes
images.py      bytes -> uint8 RGB -> the size a model wants (files.py, encoding.py: which, and written how)
prepare.py     sources -> token shards, through the image tokenizer and the grammar (cutting.py, shards.py)
filters.py     what prepare leaves out on request (duplicates, copies, alike, similar_texts: what a copy is)
validate.py    looks at every item as prepare would; prepared.py at shards; page.py shows both (view, comparison)
packing.py     which documents share a row, and which row comes when
loader.py      shards -> batches (batch.py), and images for an image tokenizer
"""
