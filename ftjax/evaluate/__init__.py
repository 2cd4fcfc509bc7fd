"""Evaluation. As `ftjax.evaluate(target, data)`, this package is the function `ftjax.api.measure.evaluate`."""
