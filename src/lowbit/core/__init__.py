"""Floor 0: tensors in, tensors out. Nothing here knows of a module or a model."""
