"""The durable record, and the only importer of SQLAlchemy. Rows never leave: callers get frozen values."""
