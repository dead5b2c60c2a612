"""Settings and a topology -> memory, time and cost of a run, without the chips."""
