"""Dispatchers: how tokens get to their experts and back. They differ in speed, never in the result."""
