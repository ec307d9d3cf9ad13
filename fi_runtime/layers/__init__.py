"""What models are built from. Layers hold their weights and are called with tensors."""
