"""Time in one room: the model of a launch, its fit to measurements, traffic, predictions, launches, measuring them."""
