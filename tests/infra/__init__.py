"""Tests that need servers or tools beyond the Python environment (make test-infra)."""
