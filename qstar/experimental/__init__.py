"""What no card has measured: nothing else in the package imports it, and it is off until it is asked for by name."""
