"""Routers: which expert gets which token, and with what weight. One class, one file or part of one, per scheme."""
