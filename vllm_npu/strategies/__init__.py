"""Which way tokens go, and each way. Read pipeline.py first, then table.py."""
