"""Training from YAML recipes: `hmoe train`, or `accelerate launch -m hmoe.training`."""
