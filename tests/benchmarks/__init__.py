"""Side-by-side timings, run on demand."""
