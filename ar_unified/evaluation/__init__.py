"""Measures how good a model is on data that it was not trained on, and writes pages that show it.

tokenizer.py      scores an image tokenizer's reconstructions under one fixed protocol
generation.py     asks a trained model about held-out documents
                  (conversations.py: asks turn by turn; examples.py: the questions and the answers)
right_answers.py  decides which answers are right, for each dataset (shapes.py and easy_vqa.py read pixels)
report.py         writes one page about everything that a run made (charts, figures, sheets, facts)
card.py           writes a bundle's model card

This package uses `sampling` to ask models. `experiment` and `cli` call it.
"""
