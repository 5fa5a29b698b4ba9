"""What a sequence may contain, in our format and in those of published systems. Imports only `errors` from this
package.

document.py    a Document is turns, a turn is text and images
rows.py        documents as JSON rows and chat messages, there and back
vocabulary.py  the one id space: text | controls | sizes | image codes | rest
border.py      the bijection between a published id space and ours
layouts.py     how a system writes images and turns: one record each
syntax.py      a layout as ids and lengths, for one vocabulary
grammar.py     Document <-> ids; each position has its role, its turn, and whether it is trained
encoded.py     ids with those marks, and how data changes them
automaton.py   the same grammar as integer state on the device
"""
