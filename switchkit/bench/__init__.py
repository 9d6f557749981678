"""Speed of the layer and of a training step, as ratios to dense models of equal FLOPs."""
