"""Losses on the routing records of a model."""
