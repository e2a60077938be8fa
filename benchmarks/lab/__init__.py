"""The instruments of the benchmarks, and the commands of a laboratory: ``python -m lab.NAME`` in ``benchmarks/``."""
