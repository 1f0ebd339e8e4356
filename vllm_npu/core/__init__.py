"""Facts and arithmetic of a step, without communication: topology, sizes, routing, limits, handles. Imports errors only."""
