"""Turns a config into a run: plans, trains, evaluates and starts it."""
