"""The transformer: ids [B, T] -> hidden states [B, T, D] -> losses or logits, on one device or a mesh.

config.py        its shape, and the presets by name
transformer.py   parameters, blocks, KV cache, head
attention.py     the door to the kernels; context.py for rows that lie over several devices
embedding.py     the lookup in a table that a mesh has cut
loss.py          cross-entropy that never holds all logits
code_vectors.py  where the rows of image codes begin

It knows of ids, positions and documents' borders, and nothing of what the ids say.
"""
