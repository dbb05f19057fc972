"""What requests and answers contain: a file for each family of endpoints."""
