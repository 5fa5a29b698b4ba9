"""Many devices and processes as one: the mesh, where arrays are placed on it, and how a job starts and ends.

mesh.py      four named axes: data, fsdp, tensor, context
rules.py     the meaning of an array's axis -> the mesh axis that splits it
zigzag.py    the order of a row's columns under context parallelism
runtime.py   the only use of `jax.distributed`; last_words.py reports a process that died
hardware.py  the speed and memory of a device, by kind
"""
