"""Records of a stage for people: the journal, MLflow (fed from the journal) and pictures."""
