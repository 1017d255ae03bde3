"""Attacks on what users rely on: numerics, files, kills, untrusted text. Each says what it tried and what got through.

    python -m benchmarks.attack

An attack is a module with a function `run(scale, seed)` that returns its figures as rows. `scale` 1 is what
docs/reliability.md reports; a smaller one is quicker.
"""
