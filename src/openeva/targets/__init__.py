"""What a masked patch should predict; one file per kind of target."""
