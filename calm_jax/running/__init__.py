"""Loading, training, evaluating and exporting a run of any stage, for the acts."""
