"""The transformer: ids [B, T] -> hidden states [B, T, D] -> losses or logits, on one device or a mesh.

config.py        the shape of a transformer, and the presets by name
transformer.py   parameters, blocks, KV cache, head
attention.py     calls the attention kernels; context.py does so for rows that are split over several devices
embedding.py     the lookup in a table that is split over a mesh
loss.py          cross-entropy that never stores all logits
code_vectors.py  the initial rows of image codes

The transformer knows ids, positions and the borders of documents, but not the meaning of ids.
"""
