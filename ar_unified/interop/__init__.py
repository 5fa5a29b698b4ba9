"""Other people's checkpoints: from their published files into a bundle, and from a bundle into their files.

    sources, sink      tensors in files, read and written one at a time
    keys               their names and their way to lay a matrix out, against our leaves
    ids                their id space against ours
    chameleon, ...     one module a system: its config, its language, its tokenizers, its defaults
    importing          files -> bundle
    exporting          bundle -> files
"""
