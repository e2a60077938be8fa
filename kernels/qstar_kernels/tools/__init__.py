"""Commands for whoever works on the kernels: what they take of a card, and which tiles are fastest."""
