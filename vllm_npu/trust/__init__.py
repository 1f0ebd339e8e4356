"""Checks between ranks: the vote on each step, the self-test, the watchdog, traces and their comparison."""
