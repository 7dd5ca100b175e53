"""Caddie's trainer: one configurable PyTorch stack for small language models under a byte budget.

Importing this package, `trainer.config`, `trainer.report` or `trainer.sizing` never imports torch:
these three are the face that the daemon may look at.
"""
