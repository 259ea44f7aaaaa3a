"""``closeout policies``: list, apply, test, backtest and shadow."""
