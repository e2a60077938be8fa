"""What a model thought at each token of a text, how much of it counted, and what it gained."""
