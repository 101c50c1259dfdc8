"""What the API and the consumer share. Nothing in here imports either of them."""
