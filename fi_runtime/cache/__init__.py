"""The paged key/value cache: its memory and who holds which page."""
