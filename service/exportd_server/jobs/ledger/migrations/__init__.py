"""Versions of the ledger's tables."""
