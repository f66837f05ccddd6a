"""Runs the one loop: optimizer and schedule, steps that are not finite, metrics."""
