"""Conversations as text: messages, the formats that write them, and the parts of a reply. Knows no model."""
