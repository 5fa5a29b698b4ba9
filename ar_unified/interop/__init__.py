"""Converts other people's published checkpoints into bundles, and bundles back into their formats.

files              finds the config, the tokenizer and the weights among the files of a download
sources            reads the tensors of these files one at a time
hf_config          reads and writes a transformer's shape in config.json
keys               maps the published tensors' names and memory layouts to our leaves
ids                maps a published id space to ours
text, chameleon, emu3, emu3_5, lwm, liquid, simplear, tar     one module for each system
importing          converts published files into a bundle
exporting          converts a bundle into published files
images             reads an image tokenizer from published files
peft               reads and writes LoRA adapters
image_tokenizer    converts an image tokenizer that has no model into the form that this project loads, and back
"""

# What `ar-unified import --as` takes. `systems` says how each system is opened; `images` says where an image
# tokenizer's settings are.
SYSTEMS = (
    "chameleon",
    "anole",
    "lumina_mgpt",
    "emu3",
    "emu3_gen",
    "emu3_chat",
    "emu3_5",
    "lwm",
    "liquid",
    "simplear",
    "tar",
    "llama",
    "qwen",
    "gemma",
)
IMAGE_SYSTEMS = ("chameleon_vq", "ibq", "llamagen_vq", "janus_vq", "emu3_vq", "showo_vq", "lwm_vq", "movqgan")
# What `ar-unified export --to` takes: FORMS for a model, DIALECTS (names of tensors) for an image tokenizer alone.
FORMS = ("hf", "meta", "lwm")
ADAPTER = "peft"  # for a model trained with LoRA: writes only the adapter
BESIDE = "base"  # for a language model extended by images and trained with LoRA: writes it without the adapter
DIALECTS = (
    "taming", "chameleon_hf", "janus_hf", "llamagen", "janus", "showo", "lwm", "movqgan", "emu3", "emu3_hf",
)  # fmt: skip
