"""Tokens and dollars."""
