"""Evaluates what a policy would have done: dry run, backtest and shadow results; imports ``runs``."""
