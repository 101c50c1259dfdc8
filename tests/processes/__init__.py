"""Tests of the program, or of a part of it, as processes; and of its pages in a browser."""
