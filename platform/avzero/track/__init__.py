"""Tracking: an MLflow run tree and its figures, fed by listening to sweeps."""
