"""What runs at the consortium's operator: rounds, admission, aggregation, checkpoints."""
