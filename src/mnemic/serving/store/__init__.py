"""Stores of sessions. `open_store` makes one from an address."""

from .interface import AuditEntry, Commit, Lease, SessionRecord, SessionStore, Usage
from .opening import open_store

__all__ = ["AuditEntry", "Commit", "Lease", "SessionRecord", "SessionStore", "Usage", "open_store"]
