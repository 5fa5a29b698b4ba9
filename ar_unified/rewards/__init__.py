"""How good an answer is, by a number: what GRPO learns from and best-of-n chooses by.

reward.py     what a reward is: asked about many answers, it gives each a number or says what went wrong
opening.py    opens a reward by its name
functions.py  a Python function, named "module:function"
command.py    a command, for other languages: JSONL in, numbers out
scores.py     a file of scores, of samples that are there
shipped.py    exact answers, checkers of pixels, length
best.py       best of n: the samples that a reward finds best, and pairs of better and worse
"""
