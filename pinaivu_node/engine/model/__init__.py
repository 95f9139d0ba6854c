"""Weights in a folder to a model that computes packed batches, on the device at hand."""
