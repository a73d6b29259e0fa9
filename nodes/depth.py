"""To come."""
NODES = []
