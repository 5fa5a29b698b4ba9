"""A config and a workdir, and the things they name. Every verb opens them first; a notebook may open them too.

config.py      every key with its default; how a config file is read
settings.py    makes the dataclasses that packages take from the parts of a config
changes.py     which keys may change in a workdir that holds a run
experiment.py  sources, tokenizers, grammar, model, engine of a config and a workdir
check.py       checks whether a config can be run, before the first stage
start.py       how a verb begins: opens and checks its experiment, with the other processes of its job
branch.py      a workdir that begins with a checkpoint of another workdir
text_tokenizer.py, tokenizer_evaluation.py   two stages that several verbs share

It may import all packages except planning; only cli imports it.
"""
