"""How well a model predicts and answers, with and without thoughts."""
