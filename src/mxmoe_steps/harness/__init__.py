"""Tasks of lm-evaluation-harness (package lm-eval, the extra [eval]): finding one, its data, and scoring."""
