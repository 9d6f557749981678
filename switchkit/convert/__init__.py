"""Models of one kind made of models of another: dense to sparse, fewer experts, and back to dense."""
