"""The systems: one file each, in family folders. The registry finds them; nothing is imported here."""
