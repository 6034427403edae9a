"""Models of texts in lm-evaluation-harness (`python -m vdm_hub.lm_eval`), with the Monte Carlo error of each."""
