"""What the notebooks and result tables are made with; the learning path does not need it."""
