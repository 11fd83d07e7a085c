"""Teachers: where answers and distributions come from."""
