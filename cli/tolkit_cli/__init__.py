"""The terminal: `tol` and its commands."""
