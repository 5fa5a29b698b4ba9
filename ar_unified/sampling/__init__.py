"""Uses a trained model. It takes requests and returns texts, images and log-likelihoods.

model.py     `load` and Model, for notebooks and adapters (conversation.py keeps the KV cache between turns)
request.py   Request and Sample; requests, formats, tables, openai_batch and columns read requests from files
plan.py      turns a request into arrays; answer.py turns tokens into a Sample
engine.py    continuous batching over steps.py, the compiled part (decoding.py, guidance.py)
score.py     log-likelihoods of given texts and images
job.py       turns a file of requests into a folder of samples (results, batch_output, benchmark_folders, gallery)
adapters/    for evaluation harnesses

This package needs only a bundle, no files of a training run.
"""
