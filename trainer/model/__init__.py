"""The decoder: attention and MLP blocks, depth recurrence, and the GPT that ties them together."""
