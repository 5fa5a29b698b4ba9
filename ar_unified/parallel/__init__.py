"""Many devices and many processes as one: the mesh, what lies where on it, and how a job begins and ends.

mesh.py      four named axes: data, fsdp, tensor, context
rules.py     what an axis of an array means -> the mesh axis that splits it
zigzag.py    the order of a row's columns under context parallelism
runtime.py   the one door to `jax.distributed`; last_words.py, what is said of a process that died
hardware.py  what one device can do, by kind
"""
