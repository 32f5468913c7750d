"""What the rivals serve: the same answer from each of them."""
