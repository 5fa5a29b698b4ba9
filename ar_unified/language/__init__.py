"""What a sequence may contain, in our format and in those of published systems. From the rest of ar_unified, this
package imports only `manifests`.

document.py    a Document, which has turns of text and images
rows.py        converts documents to JSON rows and chat messages, and back
vocabulary.py  the one id space: text | controls | sizes | image codes | rest
border.py      the bijection between a published id space and ours
layouts.py     how each system writes images and turns, one record per system
syntax.py      a layout as ids and lengths, for one vocabulary
grammar.py     converts documents to ids and back, with a mark for each id: its role, its speaker, whether it is trained
encoded.py     ids with these marks, and how the data loader changes them
automaton.py   the same grammar as integer state on the device
"""
