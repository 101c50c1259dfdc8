"""MongoDB. Nothing outside this folder imports its driver."""
