"""What moves an order on between the store and the bus. Knows both by their verbs alone."""
