"""`python -m agent` is `caddie`."""

from agent.cli import main

main()
