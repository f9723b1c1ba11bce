"""Measures of an attack, as pure functions on records."""
