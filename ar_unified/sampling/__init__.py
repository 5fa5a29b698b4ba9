"""Uses a trained model: requests in; texts, images and log-likelihoods out.

model.py     `load`: what a notebook and the adapters hold (conversation.py: one that goes on)
request.py   what is asked, and what comes back (requests, formats, tables, openai_batch, columns: read from files)
plan.py      a request -> arrays; answer.py: tokens -> what they say
engine.py    continuous batching over steps.py, the compiled part (decoding.py, guidance.py)
score.py     how likely the model finds what is given
job.py       a file of requests -> a folder of samples (results, batch_output, benchmark_folders, gallery)
adapters/    for evaluation harnesses

It needs nothing of training: a bundle is enough.
"""
