"""Tests of the MLflow tracker; its fixtures are in ``conftest.py``."""
