"""Weights in and out: other frameworks' folders <-> workdirs."""
