"""Other people's checkpoints: from their published files into a bundle, and from a bundle into their files.

files, sources     what a person downloaded; tensors in files, one at a time
hf_config          the shape of a transformer in config.json
keys               names of tensors, and how they lie, against our leaves
ids                their id space against ours
text, chameleon, emu3, emu3_5, lwm, liquid     the systems
importing          files -> bundle
exporting          bundle -> files
"""

# What `ar-unified import --as` takes; `systems` has how each is opened.
SYSTEMS = ("chameleon", "anole", "lumina_mgpt", "emu3", "emu3_5", "lwm", "liquid", "llama", "qwen", "gemma")
