"""Scripts a person runs (search.py, retrain.py, ensemble.py) and the Ray pieces they share."""
