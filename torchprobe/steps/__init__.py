"""Which step a value belongs to."""
