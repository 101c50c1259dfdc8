"""HTTP: reading requests, checking them, telling what is wrong, serving."""
