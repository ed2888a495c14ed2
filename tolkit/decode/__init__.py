"""Rows from stored bytes, in torch: what `tolkit_formats` does in numpy, on any device."""
