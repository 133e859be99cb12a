"""Networks and data that the tests, the examples and the benchmarks share; not part of the installed library."""
