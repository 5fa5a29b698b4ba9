"""Other people's checkpoints: from their published files into a bundle, and from a bundle into their files.

files, sources     what a person downloaded; tensors in files, one at a time
hf_config          the shape of a transformer in config.json
keys               names of tensors, and how they lie, against our leaves
ids                their id space against ours
text, chameleon, emu3, emu3_5, lwm, liquid, simplear, tar     the systems
importing          files -> bundle
exporting          bundle -> files
images             an image tokenizer in published files
peft               LoRA adapters, both directions
image_tokenizer    an image tokenizer alone, into this project's folder for one, and back
"""

# What `ar-unified import --as` takes. `systems` says how each system is opened, `images` where the settings of image
# tokenizers are.
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
# What `ar-unified export --to` takes: forms of a model, and for an image tokenizer alone the names of its weights.
FORMS = ("hf", "meta", "lwm")
ADAPTER = "peft"  # after a training of LoRA: only the adapter
BESIDE = "base"  # the model that the adapter belongs to, if a language model was extended
DIALECTS = (
    "taming", "chameleon_hf", "janus_hf", "llamagen", "janus", "showo", "lwm", "movqgan", "emu3", "emu3_hf",
)  # fmt: skip
