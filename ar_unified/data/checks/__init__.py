"""What is in the data, before and after it is prepared: counts, bad items, copies, and documents as a model sees them.

validate.py    looks at every item as `prepare` would; prepared.py looks at token shards
view.py        shows documents as words and as tokens; comparison.py shows copies side by side
page.py        writes all of it as one HTML page
"""
