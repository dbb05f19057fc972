"""The endpoints: each file has a router."""
