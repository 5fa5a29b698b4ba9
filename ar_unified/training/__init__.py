"""The one training loop, for the transformer and the image tokenizer alike.

loop.py        from the first step to the last: read it first
tasks.py       what is trained: model, loss, data, and the metrics of a step
step.py        (state, batch) -> (state, metrics), compiled once for a mesh
optimizer.py   AdamW, Muon, schedules
telemetry.py   what a run reports (goodput, divergence, profiler, attention_share)
probe.py       a small transformer that is trained to judge an image tokenizer
"""
