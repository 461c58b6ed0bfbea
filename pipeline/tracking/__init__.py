"""What a stage leaves behind for people: the journal (always), MLflow (fed from the journal), pictures."""
