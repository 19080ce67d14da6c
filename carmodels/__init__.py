"""The library: data, models, training, predictions, results; free of Ray, Optuna and command lines."""
