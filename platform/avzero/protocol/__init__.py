"""The two-stage protocol: roles and stages, sampling, scoring, calibration, the seal on TEST."""
