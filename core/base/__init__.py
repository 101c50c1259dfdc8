"""What every room may use: settings, ids and the clock, logs, metrics."""
