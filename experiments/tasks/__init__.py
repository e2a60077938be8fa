"""The tasks of the ladder: problems with an answer of one word, each step of which is easy."""
