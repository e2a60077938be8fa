"""What is not a setting yet: nothing else in the package imports it, and it is off until it is asked for by name."""
