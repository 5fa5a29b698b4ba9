"""How good a model is on data that it was not trained on, and the pages that show it.

tokenizer.py      an image tokenizer's reconstructions under one pinned protocol
generation.py     a trained model is asked about held-out documents
                  (conversations.py: turn by turn; examples.py: what was asked and what came back)
right_answers.py  what counts as right, per data set (shapes.py, easy_vqa.py read images from their pixels)
report.py         one page about everything that a run made (charts, figures, sheets, facts)
card.py           a bundle's card, for people

It asks models through sampling; experiment and cli call it.
"""
