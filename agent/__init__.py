"""Caddie's daemon: queue -> heartbeat -> ledger -> projection -> decision. Never imports torch."""
