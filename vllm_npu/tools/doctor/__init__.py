"""The doctor's checks, and what they find. Standard library only, but for engine_findings."""
