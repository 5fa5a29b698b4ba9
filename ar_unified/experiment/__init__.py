"""Opens a config and a workdir, and the sources, tokenizers and model that they name. Every verb of the command line
begins here; a notebook can begin here, too.

config.py      every key with its default; how a config file is read
settings.py    makes the dataclasses that packages take from the parts of a config
changes.py     which keys may change in a workdir in which a run has begun
experiment.py  the sources, tokenizers, grammar, model and engine of a config and a workdir
check.py       checks whether a config can be run, before the first stage
start.py       opens and checks the experiment of a verb, together with the other processes of its job
branch.py      makes a workdir that begins with a checkpoint of another workdir
text_tokenizer.py, tokenizer_evaluation.py   two stages that several verbs share

This package may import all packages except planning; only cli imports it.
"""
