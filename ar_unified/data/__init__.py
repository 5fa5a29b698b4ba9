"""From data sets to batches: documents are read once into token shards, and the loader packs them into rows.

sources.py     what a config names -> a source (items.py): rows, text_files, image_folder, clips, and those of
               records (records.py, columns.py): named, tables, tars, pages
images.py      bytes -> uint8 RGB -> the size a model wants (files.py, encoding.py: which, and written how)
prepare.py     sources -> token shards, through the image tokenizer and the grammar (cutting.py, shards.py)
validate.py    looks at every item as prepare would
packing.py     which documents share a row, and which row comes when
loader.py      shards -> batches (batch.py), and images for an image tokenizer
"""
