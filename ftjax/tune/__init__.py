"""`ftjax tune`: hyperparameter search on Optuna, with runs as trials."""
