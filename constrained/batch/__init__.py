"""Many small problems of one shape at once; the entry point is :func:`constrained.solve_batch`."""
