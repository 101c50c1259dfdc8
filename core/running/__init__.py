"""What makes processes of it: finding handlers, commands, health, the bundled store, the wiring."""
