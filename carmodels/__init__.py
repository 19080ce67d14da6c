"""The library: data, models, training, evaluation, ensembles, studies. Free of Ray, Optuna and argparse."""
