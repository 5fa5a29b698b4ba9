"""Adapters that let evaluation harnesses call a model. Each harness has a module, which imports that harness.
harness.py is the part that they share.
"""
