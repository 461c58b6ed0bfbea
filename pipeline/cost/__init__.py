"""What a stage costs before it runs: arithmetic, memory, bytes. Formulas and a trace; `measure` runs real steps."""
