"""Floor 2: each pass is a function on a graph. None knows another."""
