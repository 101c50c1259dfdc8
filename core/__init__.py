"""What the API and the consumer share, in folders by what they know; nothing in here imports either of them."""
