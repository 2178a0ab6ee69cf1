"""What a training run costs in time on other machines: equations with sources, published points, their errors."""
