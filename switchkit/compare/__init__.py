"""Training several recipes under one budget, on the same data in the same order, and comparing them."""
