"""Benchmarks: run by hand, print ratios measured in one run; never part of `make test`.

    make bench B=store_reading
    make bench B=training

Results are kept in docs/experiments.md with command, date and machine.
"""
