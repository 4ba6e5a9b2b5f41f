"""What a model is: its KV layout, sizes, rotation, weights, and what computing and loading cost."""
