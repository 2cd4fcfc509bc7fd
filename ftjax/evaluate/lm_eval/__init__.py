"""Tasks of lm-evaluation-harness on a model of ftjax."""
