"""The parts of the quadratic-program solver."""
