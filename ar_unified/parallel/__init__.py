"""Runs many devices and processes as one: the mesh, the placement of arrays on it, and the start and end of a job.

mesh.py      four named axes: data, fsdp, tensor, context
rules.py     the table that says which mesh axis splits which axis of an array
zigzag.py    the order of a row's columns under context parallelism
runtime.py   the only use of `jax.distributed`; last_words.py reports a process that died
hardware.py  the speed and memory of a device, by kind
"""
