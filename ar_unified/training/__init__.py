"""The one training loop, used for both the transformer and the image tokenizer.

loop.py        the whole training, from first step to last; read it first
tasks.py       what is trained: model, loss, data, and metrics of a step
step.py        (state, batch) -> (state, metrics), compiled once for a mesh
optimizer.py   AdamW, Muon, schedules
telemetry.py   what a run reports (with goodput, divergence, profiler, attention_share)
probe.py       a small transformer, trained to judge an image tokenizer
"""
