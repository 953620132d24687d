"""What sits on top of a backbone."""
