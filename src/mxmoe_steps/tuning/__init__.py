"""What `tune` computes for one layer: blocks that gradients can move, the sum of its experts, the descent."""
