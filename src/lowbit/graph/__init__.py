"""Floor 1: the working graph. The only code that imports torch.fx."""
