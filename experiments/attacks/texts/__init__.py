"""Text transforms and distributions over them: what prompt attacks disguise a request with."""
