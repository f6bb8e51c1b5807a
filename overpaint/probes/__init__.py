"""What to ask a model: prompts with the words that carry an attribute."""
