"""What ``closeout doctor`` looks at, one file for each side; nothing here changes anything."""
