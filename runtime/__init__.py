"""The hardware: trains with exactly the layout of a plan. The only package that imports torch."""
