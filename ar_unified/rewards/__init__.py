"""Rewards: numbers that say how good an answer is. GRPO learns from them, and best-of-n chooses by them.

reward.py     what a reward is: it gives each of many answers a number, or says what went wrong
opening.py    opens a reward by its name
functions.py  a Python function, named "module:function"
command.py    a command, for other languages: it reads JSONL and prints numbers
scores.py     a file of scores for existing samples
shipped.py    rewards that come with the package: exact answers, checks of pixels, length
best.py       best of n: the samples with the highest reward, and pairs of better and worse samples
"""
