"""What trained networks contain: one module for each analysis, which computes the numbers and draws the figure."""
