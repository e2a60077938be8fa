"""What a trained model says to prompts and in a chat: settings, prompts from files, continuations in batches."""
