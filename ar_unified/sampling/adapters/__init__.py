"""Adapters that let evaluation harnesses call a model: one module for each harness, which imports that harness, and the
common part (harness.py).
"""
