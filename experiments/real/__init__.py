"""A real model, trained on mathematical text in several ways; see ``experiments/real_model.py``."""
