"""The only place that knows foreign weight names, and the one place for resizing weights."""
