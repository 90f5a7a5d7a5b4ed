"""Model families: where a checkpoint keeps its experts, and hooks on a loaded model."""
