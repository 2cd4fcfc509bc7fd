"""lm-evaluation-harness: its tasks on a model of ftjax."""
