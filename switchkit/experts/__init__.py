"""Experts: what is computed on the tokens that a router sent. Stacked weights, one slice per expert."""
