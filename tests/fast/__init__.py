"""Tests that need no server: this process, or short ones, is all of it."""
