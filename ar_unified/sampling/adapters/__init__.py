"""Adapters that let evaluation harnesses call a model: one module for each harness, which imports it, and their common
part.
"""
