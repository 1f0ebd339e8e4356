"""Starts, watches and stops vLLM engines, for the demo, serve and tests."""
