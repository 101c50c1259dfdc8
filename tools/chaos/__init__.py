"""Breaking it: the whole program as real processes, ways to kill them, and a check of what must hold afterwards."""
