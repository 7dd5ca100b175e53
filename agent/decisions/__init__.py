"""What to do next, as pure functions of the ledger's view: no clock, no files, no processes."""
