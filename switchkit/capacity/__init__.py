"""Capacity policies: how many tokens an expert takes, and which ones."""
