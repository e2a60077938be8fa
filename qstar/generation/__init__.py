"""Generating text with a thought before every token, inside transformers' ``generate``."""
