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
image_tokenizer    one alone, into the folder that this project keeps one in, and back
"""

# What `ar-unified import --as` takes; `systems` has how each is opened, `images` where settings of the others stand.
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
# What `ar-unified export --to` takes: of a model, and of an image tokenizer alone the names of its weights.
FORMS = ("hf", "meta", "lwm")
ADAPTER = "peft"  # of a training of LoRA: the adapter alone
BESIDE = "base"  # and what it stands beside, where a language model was extended
DIALECTS = (
    "taming", "chameleon_hf", "janus_hf", "llamagen", "janus", "showo", "lwm", "movqgan", "emu3", "emu3_hf",
)  # fmt: skip
