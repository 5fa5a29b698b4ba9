"""A config and a workdir, and the things they name: what every verb opens first, and a notebook may open too.

config.py      every key with its default; how a config file is read
settings.py    the dataclasses that packages take, made from the parts of a config
changes.py     which keys may change in a workdir that holds a run
experiment.py  sources, tokenizers, grammar, model, engine of a config and a workdir
check.py       whether a config can be run, asked before the first stage
start.py       how a verb begins: its experiment, checked, with the other processes of its job
branch.py      a workdir that begins where another's training was
text_tokenizer.py, tokenizer_evaluation.py   the two stages that several verbs do

It stands on all rooms but planning; cli alone imports it.
"""
