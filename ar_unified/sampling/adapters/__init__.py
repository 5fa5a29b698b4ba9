"""A model as the evaluation harnesses want it: one module each, which imports its harness, and what they share."""
