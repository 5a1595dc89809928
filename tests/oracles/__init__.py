"""Independent formulas, in NumPy alone, that the library's numbers are compared with."""
