"""Floor 0: dense tensors into factors and back; pure functions, over TensorLy where it has them."""
