"""Parts that the benchmarks share: rounds, machine, contenders."""
