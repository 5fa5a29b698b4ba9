"""Fused operations, each with one meaning and an implementation for each kind of device.

attention/         causal attention over packed documents, forward and backward
decode_attention/  one query per row against its KV cache
cache_write/       new keys and values into the KV cache
qk_norm_rope.py, row_max.py, merge.py, product.py   smaller operations
backend.py         chooses the implementation; device.py finds the device that a program is traced for
"""
