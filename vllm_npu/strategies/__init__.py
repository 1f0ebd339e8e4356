"""The strategies of communication, and the choice between them. Read pipeline.py first, then table.py."""
