"""Training. As `ftjax.train(config)`, this package is the function `ftjax.api.run.train`."""
