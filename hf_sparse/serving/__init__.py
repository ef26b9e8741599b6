"""Serve many requests at a time with a method whose state of a request has a fixed size; no engine is needed here."""
