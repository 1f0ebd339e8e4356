"""Tools that never run in service: references, verification, benchmarks, simulation, and ranks and engines for tests."""
