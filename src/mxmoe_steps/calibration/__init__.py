"""What `calibrate` computes for one layer: its captured inputs by expert, quantized weights, losses."""
