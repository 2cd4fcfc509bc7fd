"""Plans. As `ftjax.plan(config, topology)`, this package is the function `ftjax.api.look.plan`."""
