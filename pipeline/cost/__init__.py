"""What a stage costs, before it runs: the memory of a rank and the arithmetic of a step; `measure` runs real steps."""
