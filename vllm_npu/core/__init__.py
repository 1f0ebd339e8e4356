"""What is true of a step without moving anything: places, sizes, routing, limits, handles. Imports errors only."""
