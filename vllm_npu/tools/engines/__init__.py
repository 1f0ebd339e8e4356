"""Starts, drives and stops vLLM engines, for the demo, serve, scripts and tests."""
