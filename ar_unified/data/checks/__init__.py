"""What is in the data, before and after it is prepared: counts, bad items, copies, and documents as a model sees them.

validate.py    looks at every item as `prepare` would; prepared.py looks at token shards
view.py        documents in words and in pieces (comparison.py: copies side by side)
page.py        all of it as one page
"""
