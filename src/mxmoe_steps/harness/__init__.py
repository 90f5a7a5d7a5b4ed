"""Tasks of lm-evaluation-harness (package lm-eval, the extra [eval]): finding one with its data, scoring a model on it."""
