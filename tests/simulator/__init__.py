"""Tests of the simulator: each is one rule, stated in its docstring."""
