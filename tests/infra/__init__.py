"""Tests against real servers: marker ``infra``, ``make test-infra``."""
