"""From data sets to batches: documents are read once into token shards, and the loader packs them into rows.

sources.py     what a config names -> a source (items.py): rows, text_files, image_folder, clips, and those of
               records (records.py, columns.py): named, tables, tars, pages
images.py      bytes -> uint8 RGB -> the size a model wants (files.py, encoding.py: which, and written how)
prepare.py     sources -> token shards, through the image tokenizer and the grammar, by all processes (claims.py,
               making.py, encoder.py, image_codes.py, cutting.py, shards.py)
filters.py     what prepare leaves out on request (duplicates, copies, alike, similar_texts: what a copy is)
validate.py    looks at every item as prepare would; prepared.py at shards; page.py shows both (view, comparison)
fitting.py     which lengths share a row
blocks.py      which documents are planned together, and the plan as a file
packing.py     which row comes when, and the documents in it
loader.py      shards -> batches (batch.py), and images for an image tokenizer
"""
