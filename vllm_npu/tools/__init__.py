"""What never runs in service: references, verification, benchmarks, simulation, ranks and engines for tests."""
