"""A compiled step and a topology -> what the run will take, before any chip is there."""
