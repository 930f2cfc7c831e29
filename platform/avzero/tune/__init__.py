"""Search on VAL: search spaces, Optuna studies, their execution by Ray Tune, the final run."""
