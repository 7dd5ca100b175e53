"""Text to tokens: gathering, splitting, tokenising, sharding, and reading back. Importing this never imports torch."""
