"""What a sequence may say, of ours and of every published system. It imports nothing of ours but `errors`.

document.py    a Document is turns, a turn is text and images
rows.py        documents as JSON rows and chat messages, there and back
vocabulary.py  the one id space: text | controls | sizes | image codes | rest
border.py      a published id space and ours, as a bijection
layouts.py     how a system writes images and turns: one record each
syntax.py      a layout in ids and lengths, for one vocabulary
grammar.py     Document <-> ids, and for every position its role, its turn, and whether it is trained
encoded.py     ids with those marks, and what data does to them
automaton.py   the same grammar as integer state on the device
"""
